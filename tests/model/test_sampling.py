"""The distribution of sampled tokens beside transformers' filters, and each draw beside the race that it has to win."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_triton import Mixtral
from mixtral_triton.model import generate, sampling
from mixtral_triton.model.sampling import sample
from tests.support.faults import Inject, replace_by
from tests.support.models import SIZES, random_model, seeded, tokens

V = SIZES["vocab_size"]
pytestmark = pytest.mark.compiled
MADE = 256, 1024  # the shape of made logits
EDGE = 1e-5  # how much fp32 sums of probabilities may differ
RACE_LIMIT = 1e-3  # how much less than the winner's the race of a sampled token may be, for fp32 arithmetic


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: Any = None, min_p: float = 0.0) -> Tensor:
    """Those of the tokens that transformers' filters leave, in their order; 0 of the others. Ties all stay."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    left, no_ids = logits[None].cpu() / temperature, torch.zeros(1, 1)
    if top_k is not None:
        left = warpers.TopKLogitsWarper(top_k)(no_ids, left)
    if top_p < 1.0:
        left = warpers.TopPLogitsWarper(top_p)(no_ids, left)
    if min_p > 0.0:
        left = warpers.MinPLogitsWarper(min_p)(no_ids, left)
    return left.softmax(-1)[0]


@pytest.mark.parametrize("temperature", (0.3, 1.5, 4.0))
@pytest.mark.parametrize("top_p", (0.01, 0.5, 0.9, 1.0))
@pytest.mark.parametrize(("top_k", "min_p"), [*((k, 0.0) for k in (None, 1, 3, V - 1, V, 10 * V)), (None, 0.3), (9, 1)])
def test_sample(top_k: int | None, min_p: float, top_p: float, temperature: float, device: torch.device) -> None:
    logits, draws = torch.randn(V, generator=torch.Generator().manual_seed(1)), 20000
    logits[[2, 5, 11]] = logits.topk(3).values[-1]  # a tie for third place
    want = probabilities(logits, temperature, top_p, top_k, min_p)
    batch = logits.to(device).expand(draws, -1)
    often = torch.bincount(sample(batch, temperature, top_p, seeded(device), top_k, min_p).cpu(), minlength=V) / draws
    assert not often[want == 0].any()
    assert (often - want).abs().sum() < 0.05


def test_a_sum_that_equals_top_p_is_enough(device: torch.device) -> None:
    assert len(sample(torch.zeros(99, 2, device=device), 1.0, 0.5, seeded(device)).unique()) == 1


@pytest.mark.parametrize("options", [{"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_options_of_generate_reach_the_draw(options: dict[str, Any], device: torch.device) -> None:
    model, ids = random_model(device), tokens(3, 3, device=device)
    assert torch.equal(model.generate(ids, 8, 4.0, generator=seeded(device), **options), model.generate(ids, 8))


def race_error(logits: Tensor, sampled_ids: Tensor, draw: Any, *options: Any) -> float:
    """How far the tokens `sampled_ids` [N] are from winning the exponential race of logits [N,V]: 0 for a winner, 1 for
    a token that does not take part (Holtzman et al. 2020; min-p: Nguyen et al. 2024)."""
    temperature, top_p, top_k, min_p = options
    clock = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=draw).double()
    p = (logits.double() / temperature).softmax(-1)
    if top_k is not None:
        p = p.where(logits >= logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], 0.0)
    p = p / p.sum(-1, keepdim=True)
    # What is before a token in the order of p must have less than top_p. Ties have any order, and fp32 sums may differ
    # at the edge: a token there may take part, and need not.
    ascending = p.sort(-1).values
    sums = F.pad(ascending.cumsum(-1), (1, 0))
    starts = (torch.searchsorted(ascending, p, right=right) for right in (True, False))
    least, most = (sums[:, -1:] - sums.gather(-1, start) for start in starts)
    race, share = p / clock, p / p.amax(-1, keepdim=True)
    allowed = race.where(((least < top_p + EDGE) | (top_p == 1)) & (share >= min_p * (1 - EDGE)), 0.0)
    certain = race.where(((most - p < top_p - EDGE) | (top_p == 1)) & (share >= min_p * (1 + EDGE)), 0.0).amax(-1)
    allowed = allowed.gather(-1, sampled_ids[:, None])[:, 0]
    return float((1 - allowed / certain.clamp(min=1e-30)).clamp(min=0.0).max())


def check_sample(logits: Tensor) -> None:
    """Check `sample` on logits [N,V], and on some with likely, equal tokens at the edges of top-k and top-p."""
    shape, device = (MADE[0], min(logits.shape[-1], MADE[1])), logits.device
    made = -1e-3 * torch.rand(shape, device=device, generator=seeded(device)).argsort(-1).float()
    k = min(50, shape[1] // 2)
    for texts, *filters in (
        (logits, 0.9, k, 0.0),
        (made, 0.9, None, 0.0),
        (made, 1.0, 3, 0.0),
        (made.round(decimals=2), 1.0, k, 0.0),
        (logits, 1.0, None, 0.2),
    ):
        top_p, top_k, min_p = filters
        ids = sampling.sample(texts, 0.8, top_p, seeded(device, 2), top_k, min_p)
        assert race_error(texts, ids, seeded(device, 2), 0.8, *filters) < RACE_LIMIT, filters


def check_generate(model: Mixtral) -> None:
    """Check that each token wins the race of its logits, with the generator's next draws."""
    prompts, settings, new = tokens(3, 4, device=model.device), (0.8, 0.9, 9, 0.0), 6
    draw, replayed = seeded(model.device, 1), seeded(model.device, 1)
    ids = model.generate(prompts, new, 0.8, 0.9, generator=draw, top_k=9)
    logits = model(ids)
    for at in range(4, 4 + new):
        assert race_error(logits[:, at - 1], ids[:, at], replayed, *settings) < 100 * RACE_LIMIT, at
    assert len(set(ids[:, 4:].flatten().tolist())) > 4


@pytest.mark.parametrize(
    ("N", "vocabulary", "dtype"),
    [(400, 60, torch.float32)]
    # Of 64 tokens, every pair of two entries would take 500 GB. bf16 has ties at the edge of top_p.
    + [pytest.param(64, 32000, dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16)],
)
def test_each_draw_wins_the_race(N: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randn(N, vocabulary, generator=torch.Generator().manual_seed(0))
    check_sample(logits.to(device, dtype).float())


def test_generate_draws_from_its_logits(device: torch.device) -> None:
    check_generate(random_model(device, sliding_window=5))


def in_sample(change: Any) -> Inject:
    return replace_by(sampling, "sample", lambda f: lambda *args: f(*change(*args)))


def in_generate(change: Any) -> Inject:
    return replace_by(generate, "sample", lambda f: lambda *args: f(*change(*args)))


def with_draw(x: Tensor, t: float, p: float, draw: Any, *rest: Any) -> Any:
    torch.rand(1, generator=draw, device=x.device)
    return x, t, p, draw, *rest


FAULTS: dict[str, tuple[Any, Inject]] = {
    "temperature twice": (check_sample, in_sample(lambda x, t, *args: (x / t, t, *args))),
    "top_p is wider": (check_sample, in_sample(lambda x, t, p, *args: (x, t, min(1.0, 1.03 * p), *args))),
    "no top_p": (check_sample, in_sample(lambda x, t, p, *args: (x, t, 1.0, *args))),
    "top_k + 1": (check_sample, in_sample(lambda x, t, p, g, k, *m: (x, t, p, g, k and k + 1, *m))),
    "a tenth of top_k": (check_sample, in_sample(lambda x, t, p, g, k, *m: (x, t, p, g, k and -(-k // 10), *m))),
    "no min_p": (check_sample, in_sample(lambda x, t, p, g, k, *m: (x, t, p, g, k))),
    "no temperature": (check_generate, in_generate(lambda x, t, *args: (x, t and 1e3, *args))),
    "a draw too many": (check_generate, in_generate(with_draw)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_draw(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, inject = FAULTS[fault]
    argument = torch.randn(400, 60, generator=seeded(torch.device("cpu"))) if check is check_sample else random_model()
    inject(monkeypatch)
    with pytest.raises(AssertionError):
        check(argument)
