"""Source code that could run a stranger's code, start a shell or reach the network fails here (SECURITY.md).

`find_unsafe` reads the syntax tree. Names are resolved through the file's imports, so `from torch import load as read`
hides nothing.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import blipfit
from blipfit.model import checkpoint_files

SOURCE = Path(blipfit.__file__).parent
FILES = {file.relative_to(SOURCE).as_posix(): file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py")}

SERIALIZERS = ("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
NETWORK = ("requests", "httpx", "aiohttp", "urllib3", "urllib.request", "http.client", "socket", "ftplib", "smtplib")
NETWORK_FILES = {
    "model/loading.py": ("urllib.request",),  # one HEAD request to the hub
    "runtime/launcher.py": ("socket",),  # a free port of this machine
}
"""Files that use the network themselves, and the modules. All downloads go through huggingface_hub."""
LOADERS = {
    *("model/loading.py", "model/clip.py", "model/tokenizer_files.py", "pretraining/make_miniatures.py"),
    "adapters/load_adapter.py",  # copied into adapter folders; runs without blipfit
}
"""Files that call `from_pretrained`."""
FORBIDDEN_CALLS = {
    **dict.fromkeys(
        ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile"), "code from text"
    ),
    **dict.fromkeys(
        ("__import__", "importlib.import_module", "runpy.run_path", "runpy.run_module"), "code by its name"
    ),
    **dict.fromkeys(
        ("torch.hub.load", "torch.hub.load_state_dict_from_url", "transformers.pipeline"), "code of a stranger"
    ),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "a shell"),
    **dict.fromkeys(("tempfile.mktemp", "os.tempnam", "os.tmpnam"), "a temporary name that others can take"),
    **dict.fromkeys(
        ("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"), "unsafe YAML"
    ),
    **dict.fromkeys(("pandas.read_pickle", "torch.package.PackageImporter"), "a pickle"),
}
SAFE_YAML_LOADERS = ("SafeLoader", "CSafeLoader")
PACKAGED_FORMATS = ("parquet", "json", "csv", "arrow", "text", "imagefolder", "webdataset")
"""Names of `load_dataset` that are formats of files, not repositories with code."""


def find_unsafe(text: str, file: str = "") -> list[str]:
    """Return `line: what is unsafe` for the text of a source file; `file` is its path below blipfit."""
    tree = ast.parse(text)
    imports = dict(_imported_names(tree))
    yaml_loaders = {*SAFE_YAML_LOADERS, *_safe_loader_classes(tree)}
    allowed = NETWORK_FILES.get(file, ())
    unsafe = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            reasons = [reason for name in _modules(node) if (reason := _explain_module(name, allowed))]
        elif isinstance(node, ast.Call):
            reasons = list(_explain_call(node, _resolve(node.func, imports), yaml_loaders))
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            reasons = [
                reason
                for key, value in pairs
                if isinstance(key, ast.Constant)
                for reason in _explain_option(key.value, value)
            ]
        else:
            reasons = []
        unsafe += [f"{node.lineno}: {reason}" for reason in reasons]
    return unsafe


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that an import may load; of `from a import b` also `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, what it stands for) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.asname, a.name) if a.asname else (a.name.split(".")[0],) * 2 for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def _safe_loader_classes(tree: ast.AST) -> Iterator[str]:
    """Classes of the file that derive from a safe YAML loader alone."""
    for node in ast.walk(tree):
        bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases] if isinstance(node, ast.ClassDef) else []
        if len(bases) == 1 and bases[0] in SAFE_YAML_LOADERS:
            yield node.name


def _resolve(function: ast.expr, imports: dict[str, str]) -> str:
    """The dotted name of a function; what is no chain of names begins with `?`."""
    if isinstance(function, ast.Attribute):
        return f"{_resolve(function.value, imports)}.{function.attr}"
    return imports.get(function.id, function.id) if isinstance(function, ast.Name) else "?"


def _explain_module(name: str, allowed: tuple[str, ...]) -> str | None:
    def is_in(modules: tuple[str, ...]) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in modules)

    if is_in(SERIALIZERS):
        return f"imports {name}, which runs code of what it reads"
    return f"imports {name}: network" if is_in(NETWORK) and not is_in(allowed) else None


def _explain_call(node: ast.Call, name: str, yaml_loaders: set[str]) -> Iterator[str]:
    options = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    for option, value in options.items():
        yield from _explain_option(option, value)
    if reason := FORBIDDEN_CALLS.get(name):
        yield f"{name}: {reason}"
    if name == "torch.load" and not _is(options.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        loader = options.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if loader is None or ast.unparse(loader).rpartition(".")[2] not in yaml_loaders:
            yield f"{name} without a safe loader"
    owner, _, method = name.rpartition(".")
    if method == "from_pretrained":
        yield from _explain_loading(owner.rpartition(".")[2], options)
    if method == "from_config" and owner.rpartition(".")[2].startswith("Auto"):
        yield from _require_no_remote_code(name, options)
    if name.rpartition(".")[2] == "load_dataset" and not any(
        _is(a, f) for a in node.args[:1] for f in PACKAGED_FORMATS
    ):
        yield "load_dataset of something else than files of a format"


def _explain_option(option: object, value: ast.expr) -> Iterator[str]:
    """Options that must be False wherever they are passed."""
    if option in ("trust_remote_code", "shell", "allow_pickle") and not _is(value, False):
        yield f"{option} is not False"


def _explain_loading(owner: str, options: dict[str, ast.expr]) -> Iterator[str]:
    """Auto classes and processors can run code of a checkpoint, and models can read pickles."""
    is_processor = "Processor" in owner and "ImageProcessor" not in owner
    if owner.startswith("Auto") or is_processor:
        yield from _require_no_remote_code(owner, options)
    is_small = is_processor or any(part in owner for part in ("Tokenizer", "ImageProcessor", "Config"))
    if not is_small and not _is(options.get("use_safetensors"), True):
        yield f"{owner}.from_pretrained without use_safetensors=True"


def _require_no_remote_code(owner: str, options: dict[str, ast.expr]) -> Iterator[str]:
    if "trust_remote_code" not in options:
        yield f"{owner} without trust_remote_code=False"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == value and type(node.value) is type(value)


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_source_is_safe(file: str):
    assert find_unsafe(FILES[file], file) == []


def test_models_and_tokenizers_are_loaded_in_these_files_only():
    assert {file for file, text in FILES.items() if ".from_pretrained(" in text} == LOADERS


def test_the_network_is_used_in_these_files_only():
    """Every exception is in use."""
    users = {file for file, text in FILES.items() if any("network" in reason for reason in find_unsafe(text))}
    assert users == NETWORK_FILES.keys()
    assert sum(text.count("urlopen(") for text in FILES.values()) == 1
    assert 'method="HEAD"' in FILES["model/loading.py"]
    assert re.findall(r"\.bind\((.*)\)", "".join(FILES.values())) == ['("127.0.0.1", 0)']


def test_the_command_that_converts_a_pickle_is_safe():
    code = re.fullmatch(r'python -c "(.*)"', checkpoint_files._CONVERT)
    assert code is not None
    assert "torch.load(" in code[1]
    assert find_unsafe(code[1]) == []
    assert find_unsafe(code[1].replace(", weights_only=True", "")) == ["1: torch.load without weights_only=True"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from pickle import loads", "imports pickle"),
        ("import marshal as m", "imports marshal"),
        ("import shelve", "imports shelve"),
        ("import dill", "imports dill"),
        ("from joblib import load", "imports joblib"),
        ("import torch\ntorch.load(f)", "torch.load without"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without"),
        ("import torch\ntorch.load(f, weights_only=flag)", "torch.load without"),
        ("from torch import load as read\nread(f)", "torch.load without"),
        ("import torch as t\nt.load(f)", "torch.load without"),
        ("import torch\ntorch.hub.load('owner/name', 'model')", "torch.hub.load"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle"),
        ("import pandas\npandas.read_pickle(f)", "a pickle"),
        ("eval(text)", "code from text"),
        ("exec(text)", "code from text"),
        ("compile(text, '', 'exec')", "code from text"),
        ("import builtins\nbuiltins.eval(text)", "code from text"),
        ("__import__(name)", "code by its name"),
        ("import importlib\nimportlib.import_module(name)", "code by its name"),
        ("import yaml\nyaml.load(text)", "safe loader"),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", "safe loader"),
        ("import yaml\nyaml.load(text, yaml.UnsafeLoader)", "safe loader"),
        ("import yaml\nclass L(yaml.Loader): pass\nyaml.load(text, L)", "safe loader"),
        ("from yaml import full_load\nfull_load(text)", "unsafe YAML"),
        ("import subprocess\nsubprocess.run(command, shell=True)", "shell"),
        ("import subprocess\nsubprocess.Popen(command, shell=flag)", "shell"),
        ("import subprocess\nsubprocess.getoutput(command)", "a shell"),
        ("import os\nos.system(command)", "a shell"),
        ("from os import popen\npopen(command)", "a shell"),
        ("import tempfile\ntempfile.mktemp()", "temporary name"),
        ("AutoTokenizer.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("AutoTokenizer.from_pretrained(name, trust_remote_code=flag)", "trust_remote_code"),
        ("AutoTokenizer.from_pretrained(name)", "without trust_remote_code=False"),
        ("import transformers\ntransformers.AutoConfig.from_pretrained(name)", "without trust_remote_code=False"),
        ("AutoModel.from_config(config)", "without trust_remote_code=False"),
        ("InstructBlipProcessor.from_pretrained(name)", "without trust_remote_code=False"),
        ("options = {'trust_remote_code': True}", "trust_remote_code"),
        ("CLIPModel.from_pretrained(name)", "without use_safetensors=True"),
        ("CLIPModel.from_pretrained(name, use_safetensors=None)", "without use_safetensors=True"),
        ("import datasets\ndatasets.load_dataset('owner/name')", "load_dataset"),
        ("from datasets import load_dataset\nload_dataset(name)", "load_dataset"),
        ("import requests", "network"),
        ("from urllib.request import urlopen", "network"),
        ("from urllib import request", "network"),
        ("import http.client", "network"),
        ("import socket", "network"),
    ],
)
def test_every_rule_can_fail(text: str, reason: str):
    unsafe = find_unsafe(text)
    assert len(unsafe) >= 1
    assert reason in unsafe[0]
    assert re.match(r"\d+: ", unsafe[0])[0] == f"{text.count(chr(10)) + 1}: "


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import re, torch\nre.compile('x'), torch.compile(f), model.eval()",
        "import yaml\nyaml.safe_load(text), yaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load(text, L)",
        "import subprocess\nsubprocess.run([program], shell=False)",
        "import tempfile\ntempfile.mkdtemp()",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=False)",
        "CLIPModel.from_pretrained(name, use_safetensors=True)",
        "CLIPImageProcessorPil.from_pretrained(name)",
        "import datasets\ndatasets.load_dataset('parquet', data_files=files)",
        "import urllib.parse, urllib.error",
    ],
)
def test_what_is_safe_passes(text: str):
    assert find_unsafe(text) == []
