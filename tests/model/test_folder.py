"""A checkpoint's folder: names on the hub against a cache on disk, and folders of other layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_triton import Mixtral, MixtralConfig, apply, verify
from mixtral_triton.cli import SMALL, main
from mixtral_triton.config import checkpoint_folder
from mixtral_triton.quantize.write import write
from tests.quantize.test_quantize_write import sharded

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("in_process"),
]
NAME, COMMIT = "someone/Mixtral-small", "0123456789" * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A repository on a hub that answers from disk; `.downloads`: the patterns and the revision of each call."""
    library = pytest.importorskip("huggingface_hub")
    remote, cache, downloads = sharded(tmp_path / "remote"), tmp_path / "cache" / "snapshots" / COMMIT, []
    (remote / "pytorch_model.bin").write_bytes(b"pickle")

    def snapshot_download(repository: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        downloads.append((repository, revision, sorted(allow_patterns)))
        cache.mkdir(parents=True, exist_ok=True)
        for file in remote.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr(library, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(remote=remote, cache=cache, downloads=downloads)


def test_a_name_on_the_hub_stands_for_its_folder(hub: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_triton.inputs.default_device", lambda: "cpu")
    assert MixtralConfig.from_pretrained(NAME) == MixtralConfig.from_pretrained(SMALL)
    assert not list(hub.cache.glob("*.safetensors")) and hub.downloads[-1][:2] == (NAME, None)
    model = Mixtral.from_pretrained(f"{NAME}@v1.0", "cpu")
    assert hub.downloads[-2][:2] == (NAME, "v1.0")
    assert hub.downloads[-1] == (NAME, COMMIT, [f"model-{number}.safetensors" for number in range(3)])
    cached, remote = ({file.name for file in folder.iterdir()} for folder in (hub.cache, hub.remote))
    assert cached == remote - {"pytorch_model.bin"}
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids), Mixtral.from_pretrained(SMALL, "cpu")(ids))
    write(NAME, "out", "int8", "cpu")
    assert not verify(NAME, ids, quick=True).wrong and (Path("out") / "config.json").is_file()
    for command in ("generate", "trace"):
        assert main([command, NAME, "--device", "cpu", "--prompt", "The return", "--json"]) == 0
    assert main(["fit", NAME, "--gpu", "h100"]) == 0
    assert "FITS" in capsys.readouterr().out


def test_a_folder_comes_before_a_name(hub: Any) -> None:
    shutil.copytree(SMALL, NAME)
    assert checkpoint_folder(NAME) == Path(NAME) and not hub.downloads


ERRORS = {
    "RepositoryNotFoundError": "is no folder here, and no public repository of the hub; a private one needs a token",
    "GatedRepoError": r"https://huggingface.co/someone/Mixtral-small, and for a token \(hf auth login, or HF_TOKEN\)",
    "RevisionNotFoundError": "the repository has no revision 'v9'",
    "LocalEntryNotFoundError": "nor complete in the hub's cache, and the hub cannot be reached",
    "HFValidationError": "is no folder here, and no public repository",
    "RuntimeError": "the hub answers two lines",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_the_hub_are_one_line(kind: str, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    error_type = getattr(errors, kind, RuntimeError)
    error = error_type.__new__(error_type)  # some need a response
    error.args = ("two\nlines",)

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=f"{NAME}@v9: .*{ERRORS[kind]}") as caught:
        Mixtral.from_pretrained(f"{NAME}@v9")
    assert str(caught.value).isprintable()


def test_offline_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library itself, which reads HF_HUB_OFFLINE when it is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (Mixtral.from_pretrained, MixtralConfig.from_pretrained, verify):
        with pytest.raises(FileNotFoundError, match=f"{NAME}: .* nor complete in .* cache, and HF_HUB_OFFLINE is set"):
            call(NAME)
    repository = tmp_path / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(SMALL, repository / "snapshots" / COMMIT)
    files = [file for file in SMALL.iterdir() if file.is_file()]
    trees = {file.name: {"size": file.stat().st_size, "blob_id": "0" * 40} for file in files}
    (repository / "trees").mkdir()
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps(trees))
    assert checkpoint_folder(NAME) == repository / "snapshots" / COMMIT


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "mistral": ({"params.json": "{}", "consolidated.safetensors": ""}, "Mistral's own layout, needs transformers'"),
    "consolidated": ({"config.json": "", "consolidated.00.pth": ""}, "'consolidated.00.pth' is of Mistral's own"),
    "lora": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "LoRA adapter, .* merge_and_unload"),
    "gguf": ({"a.Q4_0.gguf": ""}, "'a.Q4_0.gguf' is GGUF, needs safetensors"),
    "lfs": ({"config.json": "", "model.safetensors": LFS}, r"model\.safetensors: is a pointer of Git LFS, .* `git lfs"),
    "bin": ({"config.json": "", "pytorch_model.bin": ""}, "never read, needs safetensors: .*save_pretrained write"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_layouts_are_refused_with_what_to_do(case: str, tmp_path: Path, capsys: Any) -> None:
    files, message = OTHERS[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text or (SMALL / name).read_text() if name == "config.json" else text)
    for call in (Mixtral.from_pretrained, verify):
        with pytest.raises(ValueError, match=message) as caught:
            call(tmp_path)
        assert str(tmp_path) in str(caught.value)
    assert main(["generate", str(tmp_path), "--device", "cpu", "--prompt", "x"]) == 2
    line = capsys.readouterr().err
    assert str(caught.value) in line and line.count("\n") == 1


def test_lfs_pointer_of_a_tokenizer(tmp_path: Path) -> None:
    from mixtral_triton.tools.prompt import load_tokenizer

    (tmp_path / "tokenizer.json").write_text(LFS)
    with pytest.raises(ValueError, match="is a pointer of Git LFS"):
        load_tokenizer(tmp_path)


def test_fit_names_the_models_that_it_knows(capsys: Any) -> None:
    assert main(["fit", "mixtral-9x9"]) == 2
    assert "mixtral-9x9: no such folder, needs one, a name on the hub, or mixtral-8x7b or" in capsys.readouterr().err
    for text in ("24", "24GiB", "24 gib", "25.76980378GB"):
        assert main(["fit", "--memory", text, "--json"]) in (0, 1)
        assert json.loads(capsys.readouterr().out)["gpu"]["bytes"] == pytest.approx(24 * 2**30, rel=1e-4)
    for text in ("24TB", "GiB", "1.2.3"):
        with pytest.raises(SystemExit):
            main(["fit", f"--memory={text}"])


def test_apply_names_the_model_of_a_pipeline_and_weights_for_bitsandbytes(make_hf: Any) -> None:
    hf = make_hf()
    with pytest.raises(ValueError, match=r"apply: model is a SimpleNamespace, .*; give it the model inside, \.model$"):
        apply(SimpleNamespace(model=hf))  # type: ignore[type-var]
    transformers = pytest.importorskip("transformers")
    for config in ({"quant_method": "bitsandbytes"}, transformers.BitsAndBytesConfig(load_in_8bit=True)):
        hf.config.quantization_config = config
        with pytest.raises(ValueError, match=r'from_pretrained\(folder, weights="int4"\) on the folder in bf16'):
            apply(hf)


def test_no_weight_is_fetched_for_what_will_be_refused(hub: Any) -> None:
    """Another architecture; an index whose names, as patterns, would download anything."""
    index, config = hub.remote / "model.safetensors.index.json", json.loads((hub.remote / "config.json").read_text())
    index.write_text(json.dumps({"weight_map": {"a": "[m]*.safetensors"}}))
    with pytest.raises(ValueError, match=r"index.json: 'a' is in '\[m\]\*.safetensors', needs the plain name"):
        Mixtral.from_pretrained(NAME, "cpu")
    (hub.remote / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config.json: model_type is 'llama'"):
        Mixtral.from_pretrained(NAME, "cpu")
    assert len(hub.downloads) == 2
