"""Parameters from and to Hugging Face safetensors, shard by shard.

Reading goes parameter by parameter: each device's shard is cut out of the files, so host memory holds
one stacked parameter at a time. Writing goes tensor by tensor. Nothing here reads a pickle.
"""

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from xtoken_jax.errors import UserError
from xtoken_jax.mesh import single_device_mesh
from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.families import FAMILIES, Weight

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that old checkpoints stored


def load_model(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
) -> tuple[Model, Params]:
    """The model of a Hugging Face folder, its weights laid out over the mesh.

    Args:
        folder: holds config.json and model.safetensors, or the index of a sharded checkpoint; tensors
            in float32, bfloat16 or float16.
        mesh: where the parameters go, by `model.param_shardings`; by default this process's first device.
        dtype: of the parameters, "float32" or "bfloat16" (half the memory, for a frozen teacher).
        compute_dtype, remat, attention: see `Model`.

    Returns:
        The model and its parameters.

    Raises:
        UserError: what `read_config` refuses; no, truncated or unreadable weights; tensors missing, not
            used, or of another shape or dtype than config.json says.
    """
    folder = Path(folder)
    model = Model(read_config(folder), compute_dtype, remat, attention)
    target = jnp.dtype(_checked(dtype, ("float32", "bfloat16")))
    shardings = _flat(model.param_shardings(mesh or single_device_mesh()))
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        tensors = _checked_tensors(folder, model, tensors)
        params = {}
        for path, layout in _layouts(model).items():
            try:
                params[path] = _read(layout, tensors, shardings[path], target)
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {layout.weight.name} in {folder}: {error}") from error
    return model, _nested(model, params)


def init_model(
    folder: str | Path,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
) -> tuple[Model, Params]:
    """A random start from a folder's config.json alone; arguments and returns as `load_model`.

    The same key gives the same values on every mesh.

    Raises:
        UserError: what `read_config` refuses, or another dtype.
    """
    model = Model(read_config(folder), compute_dtype, remat, attention)
    target = jnp.dtype(_checked(dtype, ("float32", "bfloat16")))
    shardings = model.param_shardings(mesh or single_device_mesh())

    def make(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(target), model.init(key))

    return model, jax.jit(make, out_shardings=shardings)(key)


def save_weights(folder: str | Path, model: Model, params: Params, *, dtype: str = "float32") -> Path:
    """Writes model.safetensors under Hugging Face's names, tied weights once; returns its path.

    The file is written beside its place and renamed, so a killed save leaves the old one or none.
    The format is written here directly, because the library's writer takes all tensors at once.

    Args:
        folder: made where it does not exist.
        params: fully addressable from this process.
        dtype: of the stored tensors: "float32", "bfloat16" or "float16".

    Raises:
        UserError: another dtype, or a weight that float16 cannot hold.
        ValueError: params that are not this model's.
    """
    target = jnp.dtype(_checked(dtype, tuple(_STORED)))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, model.abstract()):
        raise ValueError("the parameters do not have the names and shapes of this model")
    layouts = _layouts(model)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, shape in _tensor_shapes(layouts).items():
        start, end = end, end + math.prod(shape) * target.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    flat = _flat(params)
    try:
        with open(partial, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, parts in _pieces(layouts).items():
                for path, layer in parts:
                    tensor = _narrowed(layouts[path].to_file(flat[path], layer), target, name)
                    # as bytes, because bfloat16 has no buffer interface of its own
                    file.write(tensor.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    return folder / WEIGHTS


class _Layout:
    """How one parameter's axes lie in its tensors, which may hold other parameters' rows too."""

    def __init__(self, weight: Weight, letters: str, shape: tuple[int, ...], of_model: dict[str, int]):
        names = letters.split()
        self.sizes = dict(zip(names, shape, strict=True))
        self.weight = weight
        self.stacked = names[0] == "L"
        self.inner = names[1:] if self.stacked else names
        self.shape = shape
        self.groups = weight.axes.split()
        self.order = "".join(self.groups)
        own = [math.prod(self.sizes[n] for n in group) for group in self.groups]
        self.start = sum(math.prod(of_model[n] for n in group) for group in weight.before.split())
        self.own_shape = tuple(own)  # of its rows in the file
        layers = range(self.sizes["L"]) if self.stacked else range(1)
        self.names = [weight.name.format(layer=layer) for layer in layers]

    def cut(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """The part of one file tensor at `index` of the parameter's axes (less L), in their order."""
        ranges = {n: s.indices(self.sizes[n])[:2] for n, s in zip(self.inner, index, strict=True)}
        slices: list[slice] = []
        for group in self.groups:
            first, rest = group[0], group[1:]
            # a shard never splits the later letters of a group: heads are split, not their widths
            width = int(np.prod([self.sizes[n] for n in rest], dtype=int))
            assert all(ranges[n] == (0, self.sizes[n]) for n in rest)
            start = 0 if slices else self.start
            slices.append(slice(start + ranges[first][0] * width, start + ranges[first][1] * width))
        part = tensor[tuple(slices)].reshape([ranges[n][1] - ranges[n][0] for n in self.order])
        return part.transpose([self.order.index(n) for n in self.inner])

    def to_file(self, param: Any, layer: int) -> np.ndarray:
        """The part of its tensor of one layer that this parameter is."""
        values = np.asarray(param[layer] if self.stacked else param)
        return values.transpose([self.inner.index(n) for n in self.order]).reshape(self.own_shape)


def _layouts(model: Model) -> dict[str, _Layout]:
    table = FAMILIES[model.config.architecture].weights
    letters, shapes = _flat(model.letters), _flat(model.abstract())
    sizes: dict[str, int] = {}
    for path, shape in shapes.items():
        sizes |= dict(zip(letters[path].split(), shape.shape, strict=True))
    return {path: _Layout(table[path], letters[path], shapes[path].shape, sizes) for path in shapes}


def _tensor_shapes(layouts: dict[str, _Layout]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; one that several parameters share has the rows of all."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layout in layouts.values():
        rows = layout.start + layout.own_shape[0]
        for name in layout.names:
            rows_so_far = shapes.get(name, (0,))[0]
            shapes[name] = (max(rows_so_far, rows), *layout.own_shape[1:])
    return shapes


def _pieces(layouts: dict[str, _Layout]) -> dict[str, list[tuple[str, int]]]:
    """Name -> the parameters (path, layer) whose rows it holds, in the order of the rows."""
    pieces: dict[str, list[tuple[str, int]]] = {}
    for path, layout in sorted(layouts.items(), key=lambda item: item[1].start):
        for layer, name in enumerate(layout.names):
            pieces.setdefault(name, []).append((path, layer))
    return {name: pieces[name] for name in _tensor_shapes(layouts)}


def _read(layout: _Layout, tensors: dict[str, Any], sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    parts: dict[str, np.ndarray] = {}  # devices that hold the same shard share one read

    def shard(index: Any) -> np.ndarray:
        if str(index) not in parts:
            layers = range(*index[0].indices(len(layout.names))) if layout.stacked else range(1)
            inner = index[1:] if layout.stacked else index
            cuts = [layout.cut(tensors[layout.names[layer]], inner).astype(dtype) for layer in layers]
            parts[str(index)] = np.stack(cuts) if layout.stacked else np.ascontiguousarray(cuts[0])
        return parts[str(index)]

    return jax.make_array_from_callback(layout.shape, sharding, shard)


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """name -> an open slice, of every tensor of the folder."""
    if (folder / WEIGHTS).is_file():
        return _open_file(folder / WEIGHTS, stack)
    if not (folder / INDEX).is_file():
        pickled = "only pickled weights" if any(folder.glob("*.bin")) else "no weights"
        raise UserError(
            f"{pickled} in {folder}: it needs {WEIGHTS} or {INDEX};"
            " student.init=random starts from config.json alone"
        )
    try:
        weight_map = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / INDEX}: {error!r}") from error
    files = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name}, which is not in the folder")
        files[name] = _open_file(folder / name, stack)
    absent = [name for name, file in weight_map.items() if name not in files[file]]
    if absent:
        raise UserError(f"{folder / INDEX} names tensors that its files do not hold: {_first(absent)}")
    return {name: files[file][name] for name, file in weight_map.items()}


def _open_file(path: Path, stack: ExitStack) -> dict[str, Any]:
    try:
        file = stack.enter_context(safe_open(path, framework="np"))
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}, truncated or not safetensors: {error}") from error


def _checked_tensors(folder: Path, model: Model, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors that the model needs, all there, with the right shapes; one error for all that is wrong."""
    expected = _tensor_shapes(_layouts(model))
    tensors = {name: t for name, t in tensors.items() if not name.endswith(_IGNORED_SUFFIXES)}
    if others := FAMILIES[model.config.architecture].other_tensors:
        tensors = {_within(name): t for name, t in tensors.items() if not name.startswith(others)}
    table = FAMILIES[model.config.architecture].weights
    embedding, head = table["embedding"].name, table["unembedding"].name
    stored_twice = model.config.tie_embeddings and head in tensors and embedding in tensors
    if stored_twice and not _equal(tensors.pop(head), tensors[embedding]):
        raise UserError(
            f"{folder}: config.json ties the embeddings, but {head} differs from {embedding};"
            " set tie_word_embeddings to false to keep both"
        )
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {_first(missing)}")
    if unused := [name for name in tensors if name not in expected]:
        problems.append(f"not used {_first(unused)}")
    shapes = [(n, tuple(tensors[n].get_shape()), shape) for n, shape in expected.items() if n in tensors]
    if wrong := [f"{n} {list(has)} instead of {list(want)}" for n, has, want in shapes if has != want]:
        problems.append(f"shape of {_first(wrong)}")
    dtypes = [(n, tensors[n].get_dtype()) for n in expected if n in tensors]
    if odd := [f"{n} {dtype}" for n, dtype in dtypes if dtype not in _STORED.values()]:
        problems.append(f"dtype of {_first(odd)} (supported: {', '.join(_STORED.values())})")
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")
    return tensors


def _within(name: str) -> str:
    """The name that a tensor of a language model within a larger one has on its own."""
    for prefix, own in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def _equal(a: Any, b: Any, rows: int = 8192) -> bool:
    """Whether two tensors hold the same values, a few rows at a time."""
    if a.get_shape() != b.get_shape():
        return False
    size = a.get_shape()[0]
    blocks = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
    return all(np.array_equal(a[block], b[block]) for block in blocks)


def _narrowed(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(tensor, dtype=dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(narrow), np.isfinite(tensor)):
        raise UserError(f"{name} holds values that float16 cannot; export in bfloat16 or float32")
    return narrow


def _checked(dtype: str, supported: tuple[str, ...]) -> str:
    if dtype not in supported:
        raise UserError(f"dtype={dtype!r}; supported: {', '.join(supported)}")
    return dtype


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _flat(tree: Params) -> dict[str, Any]:
    """A nested dict -> path "layers/attention/query" -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nested(model: Model, flat: dict[str, Any]) -> Params:
    leaves = [flat[path] for path in _flat(model.abstract())]
    return jax.tree.unflatten(jax.tree.structure(model.abstract()), leaves)
