"""Encodes tensors while they are converted: what the exporter is handed, since it knows no quantizer itself."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from edge_moe_export.convert import Encoding
from edge_moe_export.encode import encode as encode_plain

from edge_moe.formats import BlockFormat
from edge_moe_quant.encode import encode_rows, prepare
from edge_moe_quant.recipe import FILE_TYPES, RECIPES, ModelFacts, Rule, choose_formats

_FLOATS = ("F32", "F16", "BF16")


def encoding(recipe: str | None, rules: Sequence[Rule], pool: ThreadPoolExecutor, n_threads: int) -> Encoding:
    """Formats by a recipe and rules, and an encoder on `n_threads` of the pool, for `edge_moe_export.convert`."""

    def choose(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, object]) -> Mapping[str, BlockFormat]:
        formats = choose_formats(shapes, ModelFacts.from_metadata(metadata), recipe, rules)
        prepare({fmt.name for fmt in formats.values() if fmt.name not in _FLOATS})
        return formats

    def encode(parts: Iterable[np.ndarray], fmt: BlockFormat) -> Iterator[np.ndarray]:
        begun: deque[Future[np.ndarray]] = deque()
        for part in parts:
            begun.append(pool.submit(_encode, part, fmt))
            if len(begun) > n_threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    return Encoding(_file_type(recipe, rules), choose, encode)


def _encode(part: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    if fmt.name in _FLOATS:
        return encode_plain(part, fmt)
    return encode_rows(part.reshape(-1, part.shape[-1]), fmt).reshape(-1)


def _file_type(recipe: str | None, rules: Sequence[Rule]) -> int:
    return RECIPES[recipe][1] if recipe is not None else FILE_TYPES[rules[-1].format.name]
