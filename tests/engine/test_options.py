"""The options of the plugin, beside a stand-in for vLLM: its own tests need vLLM's environment."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.compiled


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mixtral_triton.vllm beside a version that is not tested, of which nothing is imported."""
    vllm: Any = ModuleType("vllm")
    vllm.__version__ = "0.0"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.delitem(sys.modules, "mixtral_triton.vllm", raising=False)
    found = import_module("mixtral_triton.vllm")
    monkeypatch.setitem(sys.modules, "mixtral_triton.vllm", found)  # and removed again
    return found


@pytest.mark.parametrize(
    "options", [{"deterministic": 1}, {"route": "yes"}, {"weights": "int3"}, {"other": True}, ["int4"], "int4"], ids=str
)
def test_options_of_another_type_are_refused(options: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 equals True, and is none: it would switch nothing on."""
    config = SimpleNamespace(additional_config={"mixtral_triton": options})
    monkeypatch.setattr(plugin, "get_current_vllm_config", lambda: config, raising=False)
    with pytest.raises(ValueError, match=r"vLLM's additional_config.* is .*, needs a dict of weights: None"):
        plugin.read_options()
    config.additional_config["mixtral_triton"] = {"deterministic": True, "weights": "int4"}
    assert plugin.read_options() == {"weights": "int4", "route": False, "deterministic": True}
