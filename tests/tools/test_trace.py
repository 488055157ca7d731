"""trace: the routes are the model's, the figures are right, and the command says what it cannot do."""

from typing import Any

import pytest
import torch

from mixtral_triton import Mixtral
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.cli.trace import Trace
from tests.cli.commands import run_json, shown

PROMPT = "The for statement\n  is used to iterate: naïve."
pytestmark = pytest.mark.compiled


def test_the_routes_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    found = run_json("trace --device cpu --dtype float32 --prompt", PROMPT)
    assert found["tokens"][0] == "<s>" and "".join(found["tokens"][1:]) == PROMPT
    settings: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, **settings)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(SMALL / "tokenizer.json"))
    ids = torch.tensor([[0, *tokenizer(PROMPT, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        routers = model.eval()(ids, output_router_logits=True).router_logits
    assert found["experts"] == [logits.topk(2).indices.tolist() for logits in routers]
    want = torch.stack([logits.softmax(-1).topk(2).values for logits in routers])
    own = Mixtral.from_pretrained(SMALL, "cpu", torch.float32)
    routes = own.trace(ids[0])
    assert routes.ids.tolist() == found["experts"] and routes.weights.tolist() == found["weights"]
    assert torch.allclose(routes.weights, want / want.sum(-1, keepdim=True), atol=1e-5)
    batch = own.trace(torch.cat((ids, ids.flip(1))))
    assert [*batch.ids.shape] == [2, *routes.ids.shape] and torch.equal(batch.ids[0], routes.ids)
    assert torch.equal(batch.ids[1], own.trace(ids[0].flip(0)).ids) and batch.weights.shape == batch.ids.shape
    with pytest.raises(ValueError, match="Mixtral: argument 'input_ids' is a list"):
        own.trace([[1, 2]])


def test_a_layer_that_runs_a_caller_s_code_is_traced_too() -> None:
    model, ids = Mixtral.from_pretrained(SMALL, "cpu", torch.float32), torch.arange(1, 20)
    want, forward = model.trace(ids), model.layers[1].forward
    model.layers[1].forward = lambda *args: forward(*args)
    assert all(map(torch.equal, model.trace(ids), want)) and len(want.ids) == len(model.layers)


def test_text_on_a_terminal_has_each_layer() -> None:
    experts = torch.tensor([[[0, 1], [1, 0], [11, 0]]] * 3)
    trace = Trace(("<s>", "def\n", "\n"), experts, 12)
    assert (
        shown(trace).count("<s>[0]def[1]\n\\n[11]\n") == 3
        and "layer 2\n" in shown(trace)
        and "\x1b" not in shown(trace)
    )
    assert len({part.split("m")[0] for part in shown(trace, color="truecolor").split("48;2;")[1:]}) == 12  # backgrounds
