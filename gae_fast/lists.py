"""Lists in the place of `librt.vecs`, for a copied folder in an environment without mypyc's runtime."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
i64 = int


class vec(list[T]):
    def __init__(self, items: Iterable[T] = (), /, *, capacity: int = 0) -> None:
        super().__init__(map(float, items))  # type: ignore[arg-type]  # not the np.float64 that an array yields


def extend(values: vec[T], items: Iterable[T], /) -> vec[T]:
    values += items
    return values
