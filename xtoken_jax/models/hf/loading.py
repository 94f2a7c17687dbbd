"""Parameters from Hugging Face safetensors, streamed into each device's shard.

Each parameter is cut out of the mapped files in blocks of layers or rows that go to the devices one after
another: beside the parameters themselves, host memory holds a few blocks.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.families import FAMILIES
from xtoken_jax.models.hf.files import DTYPES, Tensor, TensorFiles, first
from xtoken_jax.models.hf.layout import Layout, flat, layouts, own_name, pieces, tensor_shapes
from xtoken_jax.models.hf.loading_bar import LoadingBar

BLOCK_BYTES = 4 * 2**20  # of a parameter, over all devices, that are on their way at a time
_WORTH_A_THREAD = 2**20
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that old checkpoints stored
# of quantized weights, next to or in place of the weights themselves
_QUANTIZED_SUFFIXES = (
    ".scales", ".qweight", ".qzeros", ".absmax", ".weight_scale", ".weight_scale_inv", ".weight_packed",
)  # fmt: skip

_Index = tuple[slice, ...]


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
    target = jnp.dtype(checked_dtype(dtype, ("float32", "bfloat16")))
    shardings = flat(model.param_shardings(mesh or single_device_mesh()))
    files = TensorFiles(folder)
    tensors = _checked_tensors(folder, model, files)
    total = sum(tensors[name].values.nbytes for name in tensor_shapes(layouts(model)))
    with LoadingBar(f"loading {folder.name}", total) as bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        reader = _Reader(files, tensors, target, bar, threads)
        params = reader.read(layouts(model), shardings)
    leaves = [params[path] for path in flat(model.abstract())]
    return model, jax.tree.unflatten(jax.tree.structure(model.abstract()), leaves)


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
    target = jnp.dtype(checked_dtype(dtype, ("float32", "bfloat16")))
    shardings = model.param_shardings(mesh or single_device_mesh())

    def make(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(target), model.init(key))

    return model, jax.jit(make, out_shardings=shardings)(key)


class _Reader:
    """Cuts parameters out of the mapped files and puts them on the devices."""

    def __init__(
        self,
        files: TensorFiles,
        tensors: dict[str, Tensor],
        dtype: np.dtype,
        bar: LoadingBar,
        threads: Executor,
    ):
        self.files, self.tensors, self.dtype, self.bar, self.threads = files, tensors, dtype, bar, threads

    def read(self, layouts: dict[str, Layout], shardings: dict[str, NamedSharding]) -> dict[str, jax.Array]:
        """Every parameter, by path."""
        rows = {path: self._rows_at_once(layout, shardings[path]) for path, layout in layouts.items()}
        of_several = [path for path, layout in layouts.items() if rows[path] < layout.shape[0]]
        make = _zeros(
            tuple(layouts[path].shape for path in of_several),
            tuple(shardings[path] for path in of_several),
            self.dtype,
        )
        params = dict(zip(of_several, make(), strict=True))
        for path, layout in layouts.items():
            if path in params:
                params[path] = self._fill(params.pop(path), layout, shardings[path], rows[path])
            else:
                params[path] = self._place(layout, layout.shape, shardings[path], lambda index: index)
                self.bar.advance(self._stored_bytes(layout))
        return params

    def _rows_at_once(self, layout: Layout, sharding: NamedSharding) -> int:
        """How much of the first axis, as far as a device holds it, goes into a block: even blocks, or all."""
        held = sharding.shard_shape(layout.shape)[0]
        most = max(1, BLOCK_BYTES * held // (math.prod(layout.shape) * self.dtype.itemsize))
        return layout.shape[0] if most >= held else -(-held // -(-held // most))

    def _fill(self, buffer: jax.Array, layout: Layout, sharding: NamedSharding, count: int) -> jax.Array:
        """The parameter, written into the buffer a block of `count` rows after the other."""
        shape, held = layout.shape, sharding.shard_shape(layout.shape)[0]
        write = _writer(sharding)
        for done in range(0, held, count):
            start = min(done, held - count)  # the last one may begin within the one before it

            def of_parameter(index: _Index, start: int = start) -> _Index:
                """A shard of the block -> the part of the parameter that it is."""
                first = (index[0].start or 0) // count * held + start
                return (slice(first, first + count), *index[1:])

            block = self._place(layout, (shape[0] // held * count, *shape[1:]), sharding, of_parameter)
            buffer.block_until_ready()  # the files are never more than a block ahead of the devices
            buffer = write(buffer, block, np.int32(start))
            self.bar.advance(self._stored_bytes(layout) * min(count, held - done) // held)
        return buffer

    def _place(
        self,
        layout: Layout,
        shape: tuple[int, ...],
        sharding: NamedSharding,
        of_parameter: Callable[[_Index], _Index],
    ) -> jax.Array:
        parts: dict[str, np.ndarray] = {}  # devices that hold the same shard share one read

        def shard(index: Any) -> np.ndarray:
            if str(index) not in parts:
                parts[str(index)] = self._cut(layout, of_parameter(index))
            return parts[str(index)]

        array = jax.make_array_from_callback(shape, sharding, shard)
        self.files.release()
        return array

    def _cut(self, layout: Layout, index: _Index) -> np.ndarray:
        """A part of a parameter, copied: a device must not get the mapped file itself.

        The copy has the file's order of axes; on its way to the device, it is turned faster than numpy does.
        """
        if not layout.stacked:
            cut = np.array(layout.cut(self.tensors[layout.names[0]].values, index), self.dtype, order="C")
            self._check_finite(layout.names[0], cut)
            return layout.turned(cut)
        layers = range(*index[0].indices(len(layout.names)))
        cuts = [layout.cut(self.tensors[layout.names[layer]].values, index[1:]) for layer in layers]
        part = np.empty((len(layers), *cuts[0].shape), self.dtype)
        many = map if cuts[0].nbytes < _WORTH_A_THREAD else self.threads.map

        def copy(place: np.ndarray, cut: np.ndarray, layer: int) -> None:
            np.copyto(place, cut)
            self._check_finite(layout.names[layer], place)

        list(many(copy, part, cuts, layers))
        return layout.turned(part)

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        """Raise UserError for a NaN or an infinity among the values, which were copied from a tensor."""
        with np.errstate(over="ignore", invalid="ignore"):
            # A sum needs no second array, and no NaN or infinity leaves it finite.
            if np.isfinite(np.sum(values, dtype=np.float32)) or np.isfinite(values).all():
                return
        raise UserError(
            f"{self.files.path_of(name)}: the tensor {name} holds NaN or infinite values; this checkpoint is"
            " damaged or its training diverged, use an earlier one"
        )

    def _stored_bytes(self, layout: Layout) -> int:
        """How much of the files a parameter is."""
        return math.prod(layout.shape) * self.tensors[layout.names[0]].values.itemsize


@functools.cache
def _zeros(
    shapes: tuple[tuple[int, ...], ...], shardings: tuple[NamedSharding, ...], dtype: np.dtype
) -> Callable[[], tuple[jax.Array, ...]]:
    def make() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for shape in shapes)

    return jax.jit(make, out_shardings=shardings)


@functools.cache
def _writer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    """(buffer, block, start) -> the buffer with each device's part of the block at row `start` of its own."""

    def write(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        # as bits: CPUs would widen all of a bfloat16 buffer to float32 and back for each block
        bits = f"uint{8 * buffer.itemsize}"
        written = jax.lax.dynamic_update_slice_in_dim(buffer.view(bits), block.view(bits), start, axis=0)
        return written.view(buffer.dtype)

    spec = sharding.spec
    in_specs = (spec, spec, PartitionSpec())
    split = jax.shard_map(write, mesh=sharding.mesh, in_specs=in_specs, out_specs=spec)
    return jax.jit(split, donate_argnums=0, out_shardings=sharding)


def _checked_tensors(folder: Path, model: Model, files: TensorFiles) -> dict[str, Tensor]:
    """The tensors that the model needs, all there, with the right shapes; one error for all that is wrong."""
    if quantized := [name for name in files.tensors if name.endswith(_QUANTIZED_SUFFIXES)]:
        raise UserError(
            f"{folder}: the weights are quantized ({first(quantized, 1)}; by MLX, GPTQ, AWQ, bitsandbytes or"
            " in FP8), which is not implemented; use the checkpoint that this one was made from"
        )
    of_model = layouts(model)
    expected = tensor_shapes(of_model)
    stored = {own_name(model, n): t for n, t in files.tensors.items() if not n.endswith(_IGNORED_SUFFIXES)}
    tensors = {name: tensor for name, tensor in stored.items() if name is not None}
    table = FAMILIES[model.config.architecture].weights
    embedding, head = table["embedding"].name, table["unembedding"].name
    stored_twice = model.config.tie_embeddings and head in tensors and embedding in tensors
    if stored_twice and not _equal(tensors.pop(head), tensors[embedding], files):
        raise UserError(
            f"{folder}: config.json ties the embeddings, but {head} differs from {embedding};"
            " set tie_word_embeddings to false to keep both"
        )
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {first(missing)}")
    if unused := [name for name in tensors if name not in expected]:
        problems.append(f"not used {first(unused)}")
    shapes = [(n, tensors[n].shape, shape) for n, shape in expected.items() if n in tensors]
    wrong = [
        f"{n} {list(has)} instead of {list(want)}{_rows(of_model, n)}"
        for n, has, want in shapes
        if has != want
    ]
    if wrong:
        problems.append(f"shape of {first(wrong)}")
    dtypes = [(n, tensors[n].dtype) for n in expected if n in tensors]
    if odd := [f"{n} {dtype}" for n, dtype in dtypes if dtype not in DTYPES]:
        problems.append(f"dtype of {first(odd)} (supported: {', '.join(DTYPES)})")
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")
    return tensors


def _rows(of_model: dict[str, Layout], name: str) -> str:
    """Whose rows a tensor of several parameters holds."""
    parts = pieces(of_model)[name]
    rows = " + ".join(f"{layout.own_shape[0]} {layout.path.split('/')[-1]}" for layout, _ in parts)
    return f" ({rows})" if len(parts) > 1 else ""


def _equal(a: Tensor, b: Tensor, files: TensorFiles, rows: int = 8192) -> bool:
    """Whether two tensors hold the same values, a few rows at a time."""
    if a.shape != b.shape:
        return False
    for start in range(0, a.shape[0], rows):
        block = slice(start, start + rows)
        if not np.array_equal(a.values[block], b.values[block]):
            return False
        files.release()
    return True


def checked_dtype(dtype: str, supported: tuple[str, ...]) -> str:
    if dtype not in supported:
        raise UserError(f"dtype={dtype!r}; supported: {', '.join(supported)}")
    return dtype
