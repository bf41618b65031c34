"""Lists in the place of `librt.vecs`, for a copied folder in an environment without mypyc's runtime."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
i64 = int


class vec(list[T]):
    def __init__(self, items: Iterable[T] = (), /, *, capacity: int = 0) -> None:  # a list sees to its own capacity
        super().__init__(map(float, items))  # type: ignore[arg-type]  # np.float64, which an array yields, is slower


def extend(values: vec[T], items: Iterable[T], /) -> vec[T]:
    values += items
    return values
