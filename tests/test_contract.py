# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What we use of vLLM, against its sources: the installed ones, or those of another version.

Nothing of that version is imported, so the Python files of a wheel are enough:
``VLLM_SPARSE_CONTRACT=/path/of/an/unpacked/wheel/vllm pytest tests/test_contract.py``.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("vllm")
OURS = Path(__file__).parents[1] / "vllm_sparse"


def _vllm() -> Path:
    given = os.environ.get("VLLM_SPARSE_CONTRACT")
    if given:
        return Path(given)
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


VLLM = _vllm()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _module(name: str) -> Path | None:
    """The file of a module of that vLLM."""
    path = VLLM.joinpath(*name.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@cache
def _imported(path: Path) -> dict[str, tuple[str, str]]:
    """Names that a file takes from vLLM: module and name there."""
    package = (
        "vllm." + ".".join(path.parent.relative_to(VLLM).parts) if VLLM in path.parents else ""
    )
    found = {}
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level and package:
            parts = package.rstrip(".").split(".")
            module = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [module])])
        if module == "vllm" or module.startswith("vllm."):
            found |= {name.asname or name.name: (module, name.name) for name in node.names}
    return found


def _defined(path: Path) -> set[str]:
    names = set(_imported(path))
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # of modules that load their names lazily
    return names


def _class(module: str, name: str) -> tuple[Path, ast.ClassDef] | None:
    """A class, wherever that module has it from."""
    for _ in range(5):
        path = _module(module)
        if path is None:
            return None
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return path, node
        if name not in _imported(path):
            return None
        module, name = _imported(path)[name]
    return None


def _lineage(path: Path, node: ast.ClassDef) -> list[ast.ClassDef]:
    """A class of vLLM and what it derives from there."""
    found = [node]
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(name, ast.Name):
            continue
        own = [x for x in _tree(path).body if isinstance(x, ast.ClassDef) and x.name == name.id]
        if own:
            found += _lineage(path, own[0])
        elif name.id in _imported(path):
            inherited = _class(*_imported(path)[name.id])
            found += _lineage(*inherited) if inherited else []
    return found


def _function(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == name), None)


class Override(NamedTuple):
    """A method of ours over one of vLLM's."""

    where: str
    ours: ast.FunctionDef
    theirs: ast.FunctionDef


def _overrides() -> list[Override]:
    found = []
    for path in sorted(OURS.rglob("*.py")):
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.ClassDef):
                continue
            lineage = _above(path, node)
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or method.name == "__init__":
                    continue
                theirs = (_function(above, method.name) for above in lineage)
                first = next(filter(None, theirs), None)
                if first is not None:
                    where = f"{path.relative_to(OURS)}:{node.name}.{method.name}"
                    found.append(Override(where, method, first))
    return found


def _above(path: Path, node: ast.ClassDef) -> list[ast.ClassDef]:
    """Classes of vLLM from which a class of ours derives, itself or through another of ours."""
    found: list[ast.ClassDef] = []
    for base in node.bases:
        name = base.id if isinstance(base, ast.Name) else ""
        if name in _imported(path):
            above = _class(*_imported(path)[name])
            found += _lineage(*above) if above else []
            continue
        files = [path]
        for line in _tree(path).body:
            if isinstance(line, ast.ImportFrom) and name in {alias.name for alias in line.names}:
                files = [OURS.parent.joinpath(*(line.module or "").split(".")).with_suffix(".py")]
        for file in filter(Path.is_file, files):
            own = [x for x in _tree(file).body if isinstance(x, ast.ClassDef) and x.name == name]
            found += _above(file, own[0]) if own else []
    return found


def _parameters(function: ast.FunctionDef) -> tuple[list[str], set[str], bool, bool]:
    """Positional names, names of keywords only, and whether more of either kind is taken."""
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)][1:]
    named = {argument.arg for argument in given.kwonlyargs}
    return positional, named, given.vararg is not None, given.kwarg is not None


IMPORTS = sorted(
    {
        (str(path.relative_to(OURS)), *what)
        for path in OURS.rglob("*.py")
        for what in _imported(path).values()
    }
)


@pytest.mark.parametrize(("user", "module", "name"), IMPORTS)
def test_what_we_import_is_there(user, module, name):
    path = _module(module)
    assert path is not None, f"{user}: {module} is gone"
    assert name in _defined(path) or _module(f"{module}.{name}"), f"{user}: {module} has no {name}"


@pytest.mark.parametrize("override", _overrides(), ids=lambda override: override.where)
def test_what_we_override_takes_what_vllm_passes(override):
    ours, our_named, our_more, our_keywords = _parameters(override.ours)
    theirs, their_named, _, _ = _parameters(override.theirs)
    for index, name in enumerate(theirs):
        fits = ours[index] == name if index < len(ours) else our_more or name in our_named
        assert fits or our_keywords, f"{override.where}: vLLM passes {theirs}, we take {ours}"
    for name in their_named:
        assert name in our_named or name in ours or our_keywords, f"vLLM passes {name}="


class Seam(NamedTuple):
    """A method or function of vLLM's that one of ours goes on from."""

    where: str
    module: str
    owner: str | None
    name: str
    ours: ast.FunctionDef | ast.Lambda


def _seams() -> list[Seam]:
    """What `vllm_sparse.seams.replace_once` is called with, also by functions that pass it on."""
    found = []
    for path in sorted(OURS.rglob("*.py")):
        functions = [node for node in _tree(path).body if isinstance(node, ast.FunctionDef)]
        for function in functions:
            for call in _calls(function, "replace_once"):
                ours = _replacement(call.args[2], [*function.body, *functions])
                given = {argument.arg for argument in function.args.args}
                passed_on = isinstance(call.args[0], ast.Name) and call.args[0].id in given
                places = _calls(_tree(path), function.name) if passed_on else [call]
                found += [_seam(path, place.args, ours) for place in places]
    return found


def _calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function by its name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


def _replacement(make: ast.expr, nearby: list) -> ast.FunctionDef | ast.Lambda:
    """What ``make`` makes: the first function in it."""
    assert isinstance(make, ast.Name)
    maker = next(x for x in nearby if isinstance(x, ast.FunctionDef) and x.name == make.id)
    inner = (node for line in maker.body for node in ast.walk(line))
    return next(node for node in inner if isinstance(node, ast.FunctionDef | ast.Lambda))


def _seam(path: Path, arguments: list[ast.expr], ours: ast.FunctionDef | ast.Lambda) -> Seam:
    owner, name = arguments[0], ast.literal_eval(arguments[1])
    where = f"{path.relative_to(OURS)}:{ast.unparse(owner)}.{name}"
    if isinstance(owner, ast.Attribute):
        assert isinstance(owner.value, ast.Name)
        return Seam(where, ".".join(_imported(path)[owner.value.id]), owner.attr, name, ours)
    assert isinstance(owner, ast.Name)
    module, taken = _imported(path)[owner.id]
    if _module(f"{module}.{taken}"):
        return Seam(where, f"{module}.{taken}", None, name, ours)
    return Seam(where, module, taken, name, ours)


@pytest.mark.parametrize("seam", _seams(), ids=lambda seam: seam.where)
def test_what_we_go_on_from_is_there_and_takes_what_we_pass_on(seam):
    path = _module(seam.module)
    assert path is not None, f"{seam.where}: {seam.module} is gone"
    if seam.owner is None:
        assert seam.name in _defined(path), f"{seam.where}: {seam.module} has no {seam.name}"
        return
    found = _class(seam.module, seam.owner)
    assert found is not None, f"{seam.where}: {seam.module} has no {seam.owner}"
    methods = (_function(above, seam.name) for above in _lineage(*found))
    stock = next(filter(None, methods), None)
    assert stock is not None, f"{seam.where}: {seam.owner} has no {seam.name}"
    given, (theirs, *_) = seam.ours.args, _parameters(stock)
    by_place = len(given.posonlyargs)
    ours = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    leading = ["self", *theirs][: len(ours)]
    assert len(leading) == len(ours), f"{seam.where}: vLLM's takes {theirs}, we pass {ours}"
    assert leading[by_place:] == ours[by_place:], f"{seam.where}: vLLM's takes {theirs}"
    if given.vararg is None and given.kwarg is None:
        assert len(theirs) == len(ours) - 1, f"{seam.where}: vLLM passes {theirs}, we take {ours}"


def test_no_seam_is_overlooked():
    """All that is replaced, by whatever name the function goes, is in the list above."""
    written = (
        sum(path.read_text().count("replace_once(") for path in OURS.rglob("*.py")) - 1
    )  # its definition
    in_functions = sum(
        len(_calls(node, "replace_once"))
        for path in OURS.rglob("*.py")
        for node in _tree(path).body
        if isinstance(node, ast.FunctionDef)
    )
    assert in_functions == written
    assert len(_seams()) >= written


SEAMS = {
    # Words that our code relies on and no import would miss.
    "v1/core/single_type_kv_cache_manager.py": [
        "def remove_skipped_blocks", "processed_computed_tokens", "num_prompt_tokens",
        "def _remove_blocks_in_range", "req_to_blocks", "replay_boundaries", "retention_interval",
    ],
    "v1/request.py": [
        "self.block_hashes: list", "self.sampling_params = sampling_params", "extra_args",
    ],
    "v1/engine/input_processor.py": [
        "def process_inputs(", "self.vllm_config = vllm_config", "resumable: bool = False",
    ],
    "v1/engine/async_llm.py": [
        "self.input_processor.process_inputs(", "resumable=True",
        "self,\n        vllm_config: VllmConfig,", "list(stat_loggers or [])",
    ],
    "v1/engine/core.py": [
        "def preprocess_add_request(self, request", "self.preprocess_add_request(req)",
    ],
    "v1/worker/gpu_input_batch.py": ["def add_request(", "self.req_id_to_index"],
    "v1/worker/gpu/model_runner.py": [
        "def add_requests(self, scheduler_output", "def execute_model(", "self.req_states = ",
    ],
    "v1/worker/gpu/model_states/mamba_hybrid.py": [
        "= build_attn_metadata(\n            attn_groups=", "input_batch: InputBatch,",
    ],
    "v1/worker/gpu/attn_utils.py": ["req_idx=req_idx"],
    "v1/worker/gpu_model_runner.py": ["def execute_model(", "self.input_batch = "],
    "v1/kv_cache_interface.py": [
        "state_content_bytes", "tokens_per_state", "block_stride", "layer_stride",
    ],
    "v1/kv_cache_spec_registry.py": ["def _ensure_registered", "uniform_type_base_spec"],
    "v1/simple_kv_offload/worker.py": [
        "self._load_hwm", "self._store_hwm", "self._connector_metadata", "cpu_capacity_bytes",
    ],
    "v1/simple_kv_offload/metadata.py": [
        "load_event", "load_gpu_blocks", "load_cpu_blocks", "store_event", "store_gpu_blocks",
        "store_cpu_blocks",
    ],
    "config/vllm.py": ["current_platform.check_and_update_config(self)", "kv_offloading_size"],
    "config/parallel.py": [
        "_api_process_rank", "def local_world_size(self)", "def node_rank_within_dp(self)",
        "data_parallel_backend: ", "distributed_executor_backend: ",
    ],
    "v1/metrics/loggers.py": ["engine_indexes=self.engine_indexes", "logger.log()"],
    "v1/metrics/prometheus.py": ["PROMETHEUS_MULTIPROC_DIR"],
    "v1/worker/utils.py": ["forward_context[layer_name].bind_kv_cache(kv_cache)"],
    "config/cache.py": ["kv_offloading_backend", "num_gpu_blocks_override"],
    "distributed/kv_transfer/kv_connector/factory.py": ["kv_connector_module_path"],
}  # fmt: skip


@pytest.mark.parametrize("file", SEAMS)
def test_what_we_rely_on_is_still_said(file):
    path = VLLM / file
    assert path.is_file(), f"{file} is gone"
    missing = [word for word in SEAMS[file] if word not in path.read_text()]
    assert not missing, f"{file} no longer has {missing}"
