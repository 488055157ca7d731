"""verify: the runtime against torch on the user's own weights: operations, layers, logits and loaded tensors.

B batch, T tokens of a text, V vocabulary, n new tokens
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.arguments import check_ids, check_vocabulary
from ..checkpoint.config import PREFILL_CHUNK, MixtralConfig, check_value, checkpoint_folder
from ..checkpoint.tokenizer import load_tokenizer
from ..kernels.launching.launch import INTERPRETED, multiprocessors, target_arch
from ..kernels.operation.checks import dtype_name
from ..model.mixtral import Mixtral
from ..model.precompile import on_meta, on_meta_by_kind
from ..quantize.hub import read_headers
from .compare_weights import check_weights
from .forwards import UNCACHED, as_verified, cache_maker, compare_end_to_end, compare_readings, probe_config, readings
from .generation import check_generate
from .judge import Judge, catch_faults
from .probe import Step, TextReference, in_order
from .report import TORCH, Report, Row, kinds_not_run, worst_rows
from .sizes import SizedForwards, judge_sizes

TEXT_TOKENS = 66  # by default
MANY = 1 << 20  # tokens of a text, where a model has no positions
SHORTEST = 5  # tokens that make a chunk of several behind another: a shorter text is read several times
CALL_TOKENS = {False: 144, True: 4 * PREFILL_CHUNK}  # of the longest call by default: without a GPU, and on one

Progress = Callable[[int, int, str], None] | None


def verify(
    target: Mixtral | nn.Module | str | os.PathLike[str],
    input_ids: Tensor | Sequence[str] | None = None,
    progress: Progress = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    quick: bool = False,
    tokens: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Report:
    """Compare `target` with torch, or a transformers model with transformers' own modules -> Report.

    target: a Mixtral, a checkpoint folder, or a transformers model of any family, which is left as it is. One that runs
    nothing of this package, by `apply` or by name, is applied for the time. Its experts, attention, logits and each
    module that `apply` replaced are judged, and the classes that are transformers' own are listed. One in training
    mode is compared in evaluation mode, with the gradients of its experts' inputs, and is back in training mode then.
    input_ids int64 [B,T], or a list of texts of equally many tokens; None: a fixed pseudo-random text.
    progress: of the package's Mixtral, called with (steps done, steps, which steps).
    folder: the checkpoint of a Mixtral, to compare its tensors with.
    quick: the model's forwards are not also compared in fp64, which shows what 16 bits hide.
    tokens: of the pseudo-random text, and of the longest call of an operation.
    cache_dtype torch.int8: keys and values in 8 bits, in the reference, too.
    A model with activations="fp8" quantizes them here in forwards of any number of rows, as the reference does, so that
    one reference serves all of them; the operations that `generate` calls are those of its own rule.
    ValueError for a Mixtral on a mesh: its ranks compute what one process does.
    """
    is_transformers = isinstance(target, nn.Module) and not isinstance(target, Mixtral)
    check_value("verify: cache_dtype", cache_dtype, "None or torch.int8", cache_dtype in (None, torch.int8))
    if is_transformers and (folder is not None or cache_dtype is not None):
        raise ValueError("verify: target is a transformers model, needs neither folder nor cache_dtype")
    if isinstance(target, nn.Module) and any(parameter.is_meta for parameter in target.parameters()):
        raise ValueError("verify: some weights are on the meta device; load the model without offloading")
    if isinstance(target, (str, os.PathLike)):
        check_value("verify: folder", str(folder), "None: target is a folder itself", folder is None)
        folder = checkpoint_folder(target)
        target = Mixtral.from_pretrained(folder)
    elif not isinstance(target, nn.Module):
        needs = "a Mixtral, a checkpoint folder or a model of transformers"
        hint = "; give it the model inside, .model" if isinstance(getattr(target, "model", None), nn.Module) else ""
        raise ValueError(f"verify: target is a {type(target).__name__}, needs {needs}{hint}")
    elif folder is not None:
        folder = checkpoint_folder(folder)
        MixtralConfig.from_pretrained(folder)  # an error names what is wrong in the files
        read_headers(folder)
    if isinstance(target, Mixtral) and target.ranks is not None:
        needs = "a Mixtral of one process, or its folder"
        raise ValueError(f"verify: target is a Mixtral on a mesh ({target.ranks.name}), needs {needs}")
    if input_ids is not None and not isinstance(input_ids, Tensor):
        input_ids = token_ids(target, input_ids)
    if not isinstance(target, Mixtral):
        return _verify_family(target, input_ids, tokens)
    with torch.no_grad():
        return _verify(target, input_ids, progress, folder, quick, tokens, cache_dtype)


def token_ids(model: Any, texts: Any) -> Tensor:
    """Return the tokens [B,T] of texts by the tokenizer of the model's folder; ValueError for other arguments."""
    ids = []
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        if isinstance(model, Mixtral):
            tokenizer = model.tokenizer
        elif model.config.name_or_path:
            tokenizer = load_tokenizer(model.config.name_or_path)
        else:
            raise ValueError("verify: input_ids is texts, needs int64 [B, T]: the model has no folder with a tokenizer")
        ids = [tokenizer(text).input_ids for text in texts]
    if len({*map(len, ids)}) != 1:
        got = f"texts of {', '.join(map(str, map(len, ids)))} tokens" if ids else f"a {type(texts).__name__}"
        raise ValueError(f"verify: input_ids is {got}, needs int64 [B, T] or a list of texts of equally many tokens")
    return torch.tensor(ids, device=model.device)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Take a model's modules out of training mode, and afterwards back."""
    trains = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in trains:
            module.training = True


def _verify_family(model: Any, input_ids: Tensor | None, tokens: int | None) -> Report:
    from .. import hf
    from ..hf.training import untrained_targets
    from .families import FamilyUnderTest, gradient_rows

    for path in untrained_targets(model):
        need = "adapters on linears alone, or dense experts"
        raise ValueError(f"verify: {path} is quantized, and PEFT's target_parameters train nothing there, needs {need}")
    runs = hf.runs_here(model)
    if not runs:
        hf.check_model("verify", model)
        hf.apply(model)
    try:
        config = next(part.config for part in model.modules() if hasattr(part, "config")).get_text_config()
        ids, target = default_text(input_ids, config, model.device, tokens), FamilyUnderTest(model)
        trains = model.training
        with torch.no_grad(), in_evaluation(model):
            rows = target.compare(ids) + (gradient_rows(model, ids) if trains else [])
    finally:
        if not runs:
            hf.revert(model)
    about = backend_name(ids.device), dtype_name(model.dtype), "transformers' own modules", target.not_run
    return Report(tuple(rows), target.flips, target.routed, *about)


def backend_name(device: torch.device) -> str:
    """What computes the operations on this device."""
    if device.type == "cuda":
        return f"Triton on {torch.cuda.get_device_name(device)}"
    return "Triton, interpreted" if INTERPRETED else TORCH


def default_text(ids: Tensor | None, config: Any, device: torch.device, tokens: int | None = None) -> Tensor:
    """`ids` int64 [B,T], checked; None: two sequences of a fixed pseudo-random text of `tokens` tokens."""
    limit = getattr(config, "max_position_embeddings", None) or MANY
    if ids is not None:
        check_ids("verify", ids, config.vocab_size, device)
        check_vocabulary("verify", ids, config.vocab_size)
        if (length := ids.shape[1]) > limit:
            raise ValueError(f"verify: input_ids has {length} tokens, needs at most {limit}, the model's positions")
        return ids
    needs = f"2 to {2 * limit}, in two sequences of {limit} positions"
    check_value("verify: tokens", tokens, needs, tokens is None or 2 <= tokens <= 2 * limit)
    length, generator = min((tokens or TEXT_TOKENS) // 2, limit), torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, length), generator=generator).to(device)


def _verify(
    model: Mixtral, input_ids: Any, progress: Progress, folder: Any, quick: bool, tokens: Any, cache_dtype: Any
) -> Report:
    device, L = model.device, model.config.num_hidden_layers
    ids, on_gpu = default_text(input_ids, model.config, device, tokens), device.type == "cuda"
    if (length := ids.shape[1]) < (least := min(SHORTEST, model.config.max_position_embeddings)):
        ids = ids[:, torch.arange(least, device=device) % length]

    def steps(part: str, total: int) -> Step:
        """Return what is called after each of so many steps, which take about the same time."""
        done = count()

        def step() -> None:
            if progress is not None and total:
                progress(next(done), total, part)

        step()
        return step

    kernels, not_run = INTERPRETED or on_gpu, dict[str, None]()
    rows = check_weights(model, folder, steps("weights", L if folder is not None else 0))
    text = TextReference(model, probe_config(model.config, ids.shape[1]), ids, cache_dtype, steps("reference", L))
    whole = text if text.config == model.config else TextReference(model, model.config, ids, cache_dtype)
    judge = Judge(model)
    layer_rows, cache = compare_readings(model, ids, text, judge, quick, steps)
    if kernels:
        longest, gpu = tokens or CALL_TOKENS[on_gpu], (target_arch(device), multiprocessors(device))
        sized = SizedForwards(on_meta(model, [0]), longest, gpu, cache_dtype)
        judge_sizes(judge, model, ids, cache, sized, steps)
        not_run = sized.not_run
    layer_rows = [*worst_rows(judge.rows), *in_order(layer_rows)]
    rows += sorted(layer_rows, key=lambda row: math.inf if row.layer is None else row.layer)
    row, flips = compare_end_to_end(model, ids, whole)
    rows.append(row)
    with catch_faults(lambda note: rows.append(Row.exact(None, "generate", "", False, note))):
        steps("generate", 1)
        rows += check_generate(model, ids, whole, cache_dtype)
    kinds = kinds_not_run(rows, kernels, cache_dtype is not None, model.activations is not None)
    about = backend_name(device), dtype_name(model.dtype), TORCH, (*not_run, *kinds)
    return Report(tuple(rows), flips, L * ids.numel(), *about)


def launch_calls(model: Mixtral, tokens: int | None, cache_dtype: Any) -> None:
    """Launch on the meta device the operations that `verify` calls on the model's GPU with the same options, and the
    text that it has by default. Most of its kernels are among them."""
    gpu = target_arch(model.device), multiprocessors(model.device)
    copied, shape = on_meta_by_kind(model), default_text(None, model.config, model.device, tokens).shape
    judge, config = Judge(copied), probe_config(copied.config, shape[1])
    make_cache, is_int8 = cache_maker(copied, config, cache_dtype), cache_dtype is not None
    with as_verified(copied, config), judge.watching(copied):
        for case, tokens_of_text, _, cache, lengths in readings(shape[0], shape[1], make_cache, is_int8):
            judge.start(case, with_others=case == UNCACHED)
            lengths = None if lengths is None else lengths.to("meta")
            copied.head(copied.hidden(tokens_of_text.to("meta"), cache, lengths)[:, 0])
    for _ in SizedForwards(on_meta(model, [0]), tokens or CALL_TOKENS[True], gpu, cache_dtype).select():
        pass
