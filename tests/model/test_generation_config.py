"""generation_config.json: the ids that end a text, defaults of the command's sampling, wrong files; stop strings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import Mixtral, MixtralConfig
from mixtral_triton.cli import SMALL, main
from mixtral_triton.tools.prompt import TimedSteps, load_tokenizer, print_stream

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("in_process"),
]
PROMPT, NEW = "The return statement", 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in SMALL.iterdir():
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


def write(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def generate(capsys: Any, folder: Path, *args: str) -> tuple[dict[str, Any], str]:
    options = ["--device", "cpu", "--max-new-tokens", str(NEW), "--json", *args]
    assert main(["generate", str(folder), "--prompt", PROMPT, *options]) == 0
    out, error = capsys.readouterr()
    return json.loads(out), error


def test_ids_of_both_files_end_a_text(folder: Path, capsys: Any) -> None:
    """As in transformers, whose text is the same."""
    transformers = pytest.importorskip("transformers")
    plain = generate(capsys, folder)[0]["tokens"]
    end = plain[4]
    write(folder, eos_token_id=[1, end])
    assert set(MixtralConfig.from_pretrained(folder).eos_token_id) == {1, end}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[0, *load_tokenizer(folder).encode(PROMPT, add_special_tokens=False).ids]])
    want = theirs.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)[0].tolist()
    assert Mixtral.from_pretrained(folder, "cpu").generate([ids[0]], NEW)[0].tolist() == want
    assert generate(capsys, folder)[0]["tokens"] == want[ids.shape[1] :] == plain[: plain.index(end) + 1]
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": plain[2]}
    (folder / "config.json").write_text(json.dumps(config))
    assert generate(capsys, folder)[0]["tokens"] == plain[: plain.index(plain[2]) + 1]


def test_chat_stops_at_the_end_of_turn_of_generation_config(folder: Path, capsys: Any) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ messages[-1].content }}"})
    )
    plain, _ = generate(capsys, folder, "--chat")
    write(folder, eos_token_id=plain["tokens"][5])
    found, _ = generate(capsys, folder, "--chat")
    length = plain["tokens"].index(plain["tokens"][5]) + 1
    assert found["tokens"] == plain["tokens"][:length] and found["messages"][-1]["content"] == found["text"]
    assert main(["generate", str(folder), "--prompt", PROMPT, "--chat", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == found["text"] + "\n" != plain["text"] + "\n"


def test_sampling_of_generation_config_is_the_default_of_the_command_line(folder: Path, capsys: Any) -> None:
    greedy, error = generate(capsys, folder)
    assert "generation_config.json" not in error
    options = ["--temperature", "0.9", "--top-k", "7", "--top-p", "0.8", "--min-p", "0.02"]
    want, error = generate(capsys, folder, *options)
    assert want["tokens"] != greedy["tokens"] and "generation_config.json" not in error
    write(folder, do_sample=True, temperature=0.9, top_k=7, top_p=0.8, min_p=0.02, repetition_penalty=1.1)
    found, error = generate(capsys, folder)
    assert found["tokens"] == want["tokens"]
    assert error.count("generation_config.json sets temperature 0.9, top_k 7, top_p 0.8, min_p 0.02\n") == 1
    assert error.count("repetition_penalty 1.1 of generation_config.json is ignored") == 1
    found, error = generate(capsys, folder, "--temperature", "0")
    assert found["tokens"] == greedy["tokens"] and "sets" not in error
    found, error = generate(capsys, folder, *options[:2])
    assert found["tokens"] == want["tokens"] and "sets top_k 7, top_p 0.8, min_p 0.02\n" in error
    ids = torch.tensor([0, *load_tokenizer(folder).encode(PROMPT, add_special_tokens=False).ids])
    library = Mixtral.from_pretrained(folder, "cpu").generate([ids], NEW)[0]
    assert library[len(ids) :].tolist() == greedy["tokens"], "the library stays greedy unless told"
    write(folder, do_sample=False, temperature=0.9, repetition_penalty=1.0, top_k=0)
    found, error = generate(capsys, folder)
    assert found["tokens"] == greedy["tokens"] and "generation_config.json" not in error
    write(folder, do_sample=True)
    assert "sets temperature 1.0\n" in generate(capsys, folder)[1]


NAN = float("nan")
WRONG: dict[str, tuple[Any, ...]] = {
    "eos_token_id": ("2", 2.0, [[1]], [1, "2"], [], 1 << 30, [1, 1 << 30], True, -2, NAN, {}),
    "temperature": ("hot", NAN, -0.5, [1], True, float("inf")),
    "top_p": ("a", 0, 1.5, NAN),
    "top_k": ("5", -1, 2.5, NAN, True),
    "min_p": ("a", -0.1, 1.5, NAN),
    "do_sample": (1, "true", 0.0),
    "repetition_penalty": ("a", 0, NAN),
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def check_one_line(folder: Path, capsys: Any, *parts: str) -> None:
    assert main(["generate", str(folder), "--prompt", PROMPT, "--device", "cpu", "--max-new-tokens", "1"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1
    assert all(part in error for part in (str(folder / "generation_config.json"), *parts)), error


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_wrong_field_is_one_line(name: str, value: Any, folder: Path, capsys: Any) -> None:
    write(folder, **{name: value})
    check_one_line(folder, capsys, f"{name} is ", "needs")


@pytest.mark.parametrize("kind", ["1 GB", "FIFO", "folder", "dangling link", "/dev/zero", "no JSON", "a list", "bytes"])
def test_a_wrong_file_is_one_line(kind: str, folder: Path, capsys: Any) -> None:
    file = folder / "generation_config.json"
    if kind == "1 GB":
        with file.open("wb") as opened:
            opened.truncate(10**9)
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to(folder / "absent")
    elif kind == "/dev/zero":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes({"no JSON": b"{", "a list": b"[1]", "bytes": b"\xff"}[kind])
    check_one_line(folder, capsys)


class Words:
    """A tokenizer whose tokens are the parts of a text, of which some are half a character."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(self.parts[id] for id in ids).decode(errors="replace")


STOPPED: dict[str, tuple[list[bytes], list[str], str, int]] = {
    "in one token": ([b"a", b"b END c", b"d"], ["END"], "ab ", 2),
    "over tokens": ([b"a", b"E", b"N", b"D", b"x"], ["END"], "a", 4),
    "begins and fails": ([b"a", b"EN", b"x", b"EN"], ["END"], "aENxEN", 4),
    "begins again": ([b"aE", b"ENE", b"ND"], ["END"], "aEEN", 3),
    "the first of two": ([b"one\n", b"\nUs", b"er: x"], ["User:", "\n\n"], "one", 2),
    "half a character": ([b"\xc3", b"\xbc", b"EN", b"D"], ["END"], "ü", 4),
    "in the middle of a character": ([b"x", b"\xe2", b"\x82", b"\xac", b"y"], ["€"], "x", 4),
    "none": ([b"a", b"b"], [], "ab", 2),
}


@pytest.mark.parametrize("case", STOPPED)
@pytest.mark.parametrize("shown", ["> ", None])
def test_no_part_of_a_stop_string_is_shown(case: str, shown: str | None, capsys: Any) -> None:
    parts, stop, want, count = STOPPED[case]
    times: list[str] = []

    def tokens() -> Any:
        for number in range(len(parts)):
            times.append(capsys.readouterr().out)
            yield torch.tensor([number])

    steps = TimedSteps(tokens(), 1, torch.device("cpu"))
    found, text = print_stream(steps, Words(*parts), shown, [], len(parts), stop)
    times.append(capsys.readouterr().out)
    assert found == list(range(count)) and text == want
    printed = "".join(times)
    assert printed == ("" if shown is None else f"> {want}\n")
    so_far = ""
    for part in times[:-1]:
        so_far += part
        assert f"> {want}".startswith(so_far), "nothing is printed that is not of the text"


def test_command_ends_before_a_stop_string(folder: Path, capsys: Any) -> None:
    plain, _ = generate(capsys, folder)
    stop = plain["text"][9:13]
    found, _ = generate(capsys, folder, "--stop", "never", "--stop", stop)
    cut = plain["text"][: plain["text"].index(stop)]
    assert found["text"] == cut and found["tokens"] == plain["tokens"][: len(found["tokens"])] != plain["tokens"]
    assert main(["generate", str(folder), "--prompt", PROMPT, "--device", "cpu", "--stop", stop]) == 0
    assert capsys.readouterr().out == f"{PROMPT}{cut}\n"
    assert main(["generate", str(folder), "--prompt", PROMPT, "--device", "cpu", "--stop", ""]) == 2
    assert "--stop is empty" in capsys.readouterr().err
