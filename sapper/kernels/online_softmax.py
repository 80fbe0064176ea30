"""The recurrence of the online softmax (Milakov and Gimelshein, 2018), as functions that kernels inline.

What has been seen of the positions so far is three values: the maximum of their scores, the sum of their weights, and
the sum of their weighted values. A weight is power(score - maximum), where power is exp, or exp2 where scores are
exponents of 2.
"""

from typing import Any

from sapper import max, maximum, sum


def attend(highest: Any, total: Any, acc: Any, score: Any, values: Any, p: Any, power: Any, narrow: Any) -> Any:
    """After one more tile of positions p, whose values are given. narrow: the dtype to which weights are rounded before
    they multiply these."""
    higher = maximum(highest, max(score, over=p))
    weight = power(score - higher)
    shrink = power(highest - higher)
    return higher, total * shrink + sum(weight, over=p), acc * shrink + weight.to(narrow) @ values


def attend_scaled(highest: Any, total: Any, acc: Any, score: Any, scale: Any, values: Any, p: Any, power: Any,
                  narrow: Any) -> Any:
    """The same where scores are to be multiplied by `scale`, which is above 0. The maximum is of scores as they are: of
    each there is left one multiply-add on its way to the power."""
    higher = maximum(highest, max(score, over=p))
    limit = higher * scale
    weight = power(score * scale - limit)
    shrink = power(highest * scale - limit)
    return higher, total * shrink + sum(weight, over=p), acc * shrink + weight.to(narrow) @ values


def join(highest: Any, total: Any, acc: Any, other: Any, other_total: Any, other_acc: Any, power: Any) -> Any:
    """After what a split of the positions left."""
    higher = maximum(highest, other)
    weight = power(other - higher)
    shrink = power(highest - higher)
    return higher, total * shrink + weight * other_total, acc * shrink + weight * other_acc
