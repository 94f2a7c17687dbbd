"""Parameters to Hugging Face safetensors: tensor by tensor, in one file or in several with an index.

The files are written here directly, because the library's writer takes all tensors of a file at once.
"""

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xtoken_jax.errors import UserError
from xtoken_jax.files import to_disk
from xtoken_jax.files.new_files import NewFile, remove_partials
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.files import DTYPES, INDEX, WEIGHTS, TensorFiles
from xtoken_jax.models.hf.layout import Layout, flat, layouts, own_name, pieces, tensor_shapes

MAX_SHARD_SIZE = "5GB"
_STORED = {dtype.name: stored for stored, dtype in DTYPES.items()}
_SHARD = re.compile(r"model(-\d+)?-\d{5,}-of-\d{5,}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_ROWS_BYTES = 64 * 2**20  # of a matrix without layers, such as the embedding, gathered at a time


def save_weights(
    folder: str | Path,
    model: Model,
    params: Params,
    *,
    dtype: str | Mapping[str, str] = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    writes: bool = True,
) -> Path | None:
    """Writes the parameters under Hugging Face's names, tied weights once.

    What fits into `max_shard_size` becomes model.safetensors; else there are files
    model-00001-of-0000N.safetensors and model.safetensors.index.json. Weights of an earlier save are
    replaced; a killed save leaves the old ones or the new ones, whole. So that it can, files whose names an
    earlier save has taken are called model-2-00001-of-0000N.safetensors: readers go by the index.

    Args:
        folder: made where it does not exist.
        params: gathered one tensor at a time; of several processes, all must call this.
        dtype: of the stored tensors, "float32", "bfloat16" or "float16": one for all or, by name, one for
            each, as `stored_dtypes` reads them.
        max_shard_size: bytes of tensors in a file, a number or such as "5GB" or "500MB"; a tensor that
            is larger has a file of its own.
        writes: of several processes one alone; the others give their shards and touch no file.

    Returns:
        The path of model.safetensors, or of the index; None where it does not write.

    Raises:
        UserError: another dtype, a size that cannot be read, or a weight that float16 cannot hold.
        ValueError: params that are not this model's.
    """
    limit = _bytes_of(max_shard_size)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, model.abstract()):
        raise ValueError("the parameters do not have the names and shapes of this model")
    of_model = layouts(model)
    shapes = tensor_shapes(of_model)
    dtypes = _dtypes(shapes, dtype)
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    by_path, by_name = flat(params), pieces(of_model)
    if not writes:
        for name in shapes:
            for layout, layer in by_name[name]:
                for _ in _gathered(by_path[layout.path], layout, layer):
                    pass
        return None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(sizes, limit, folder)
    remove_partials(folder, is_weights)  # of any number of files
    with contextlib.ExitStack() as stack:
        new = {}
        for file, names in shards.items():
            new[file] = out = stack.enter_context(NewFile(folder / file))
            out.write(_header({name: shapes[name] for name in names}, dtypes))
            for name in names:
                for layout, layer in by_name[name]:
                    for rows in _gathered(by_path[layout.path], layout, layer):
                        tensor = _narrowed(layout.to_file(rows), dtypes[name], name)
                        # as bytes, because bfloat16 has no buffer interface of its own
                        out.write(tensor.reshape(-1).view(np.uint8).data)
            out.finish()
        if len(shards) > 1:
            where = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            new[INDEX] = stack.enter_context(NewFile(folder / INDEX))
            new[INDEX].write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
            new[INDEX].finish()
        _swap_in(folder, new)
    return folder / (INDEX if len(shards) > 1 else WEIGHTS)


def stored_dtypes(folder: str | Path, model: Model) -> dict[str, str]:
    """Name -> dtype of every tensor of the model as a folder has it stored, for `save_weights`.

    Raises:
        UserError: no weights in the folder, or they are not this model's.
    """
    expected = tensor_shapes(layouts(model))
    names = {dtype: name for name, dtype in _STORED.items()}
    files = TensorFiles(Path(folder))
    found = {own_name(model, name): names.get(tensor.dtype) for name, tensor in files.tensors.items()}
    if missing := [name for name in expected if found.get(name) is None]:
        raise UserError(f"the weights in {folder} lack {missing[0]}, whose dtype is asked for")
    return {name: str(found[name]) for name in expected}


def is_weights(name: str) -> bool:
    """Whether `save_weights` writes a file of this name."""
    return name in (WEIGHTS, INDEX) or _SHARD.fullmatch(name) is not None


def _shards(sizes: dict[str, int], limit: int, folder: Path) -> dict[str, list[str]]:
    """File -> the tensors it holds, in their order; where there are several, of names that are free."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    prefixes = itertools.chain(["model"], (f"model-{n}" for n in itertools.count(2)))
    for prefix in prefixes:
        files = [f"{prefix}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        if not any((folder / file).exists() for file in files):
            break
    return dict(zip(files, groups, strict=True))


def _swap_in(folder: Path, new: Mapping[str, NewFile]) -> None:
    """Rename the written files into place and remove older ones; one step of it changes what readers find.

    They look for model.safetensors first, then for the index; files that it does not name are nothing.
    """
    for name, file in new.items():
        if name != INDEX:
            file.take_place()
    to_disk(folder)
    if INDEX in new:
        new[INDEX].take_place()
        to_disk(folder)
        (folder / WEIGHTS).unlink(missing_ok=True)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    to_disk(folder)
    for path in list(folder.iterdir()):
        if _SHARD.fullmatch(path.name) and path.name not in new:
            path.unlink()


def _header(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype]) -> bytes:
    """What stands before the data of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": _STORED[dtypes[name].name], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8
    return len(head).to_bytes(8, "little") + head


def _gathered(param: jax.Array, layout: Layout, layer: int) -> Iterator[np.ndarray]:
    """One layer of a parameter on the host or, of one without layers, its rows in blocks.

    Slices rather than the parameter itself, which would keep its gathered copy for as long as it lives.
    """
    take: Callable[[jax.Array, np.int32, int], jax.Array] = _rows
    if not getattr(param, "is_fully_addressable", True):
        take = _rows_everywhere(param.sharding)
    if layout.stacked:
        yield np.asarray(take(param, np.int32(layer), 1))[0]
        return
    count = max(1, _ROWS_BYTES * param.shape[0] // max(1, param.nbytes))
    for start in range(0, param.shape[0], count):
        size = min(count, param.shape[0] - start)
        yield np.asarray(take(param, np.int32(start), size))


@functools.partial(jax.jit, static_argnums=2)
def _rows(param: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(param, start, count)


@functools.cache
def _rows_everywhere(sharding: NamedSharding) -> Callable[[jax.Array, np.int32, int], jax.Array]:
    """The same for parameters that are laid out so, with the rows on all devices of all processes."""
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=everywhere)


def _narrowed(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(tensor, dtype=dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(narrow), np.isfinite(tensor)):
        raise UserError(f"{name} holds values that float16 cannot; export in bfloat16 or float32")
    return narrow


def _dtypes(shapes: dict[str, tuple[int, ...]], dtype: str | Mapping[str, str]) -> dict[str, np.dtype]:
    """Name -> dtype of each tensor."""
    named = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else {name: dtype[name] for name in shapes}
    if odd := [value for value in named.values() if value not in _STORED]:
        raise UserError(f"dtype={odd[0]!r}; supported: {', '.join(_STORED)}")
    return {name: jnp.dtype(value) for name, value in named.items()}


def _bytes_of(size: int | str) -> int:
    """Bytes of a number, of "5GB" (powers of 1000) or of "5GiB" (of 1024)."""
    found = _SIZE.fullmatch(str(size).strip())
    count = 0
    if found:
        number, prefix, binary = found.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if count < 1:
        raise UserError(f"max_shard_size={size!r}: not a size; give bytes, or such as 5GB or 500MB")
    return count
