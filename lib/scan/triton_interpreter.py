"""Triton's interpreter, made usable: scans that do not cost a Python call an element.

Without a GPU, `TRITON_INTERPRET=1` runs kernels in numpy. Nearly all of it is vectorised; only
`tl.associative_scan` calls its combine function once an element, about 0.1 ms each. Here the whole
tile is combined at once, in log2(length) rounds (Hillis and Steele 1986). And `triton.language` is
patched once a launch, where Triton does it again for each call of a function inside a kernel.

A kernel without its mask writes past the end of a tensor, and the process dies of it;
`in_bounds` stops it first.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np


def fast_interpreter() -> bool:
    """Make scans and calls of functions fast in the interpreter, once a process.

    True where that is done. Without effect, and False, where kernels are compiled, or where this
    Triton's interpreter is built differently (seen to work: 3.4 to 3.9). A combine function that
    branches runs as before.
    """
    try:
        from triton import knobs, language
        from triton.runtime import interpreter

        slow, patch_tensor = interpreter.ScanOps.generic_scan, interpreter._patch_lang_tensor
        patch_language = interpreter._patch_lang
    except (ImportError, AttributeError):
        return False
    if not knobs.runtime.interpret:
        return False
    if hasattr(slow, "slow"):
        return True

    def generic_scan(self, inputs):
        try:
            return scan(self, inputs)
        except Exception:  # noqa: BLE001
            # whatever it is, the interpreter's own way is right, or says what is wrong
            return slow(self, inputs)

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        # before Triton 3.7 a number is an array of one element, which numpy 2.4 no longer turns
        # into an int
        tensor.__index__ = lambda self: int(self.handle.data.item())

    # as a function sees it that has imported all there is to patch
    everything = SimpleNamespace(__globals__={"tl": language, "core": language.core})

    def patch_lang(function):
        if any(language.core.is_builtin(place.load) for place in (language, language.core)):
            return patch_language(everything)
        # inside a launch it is done already, and undone when that ends
        return SimpleNamespace(restore=lambda: None)

    generic_scan.slow = slow
    interpreter.ScanOps.generic_scan = generic_scan
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang = patch_lang
    return True


def scan(self, inputs):
    """What `ScanOps.generic_scan` returns: the tiles `inputs`, scanned along `self.axis`.

    They are equal in shape. Raises TypeError where the combine function asks whether a tile is
    true: a branch needs one number at a time.
    """
    data, types = [t.handle.data for t in inputs], [t.dtype for t in inputs]
    length = data[0].shape[self.axis]
    place = np.moveaxis(np.arange(length).reshape(length, *[1] * (data[0].ndim - 1)), 0, self.axis)
    tensor = type(inputs[0])
    truth, tensor.__bool__ = tensor.__bool__, None
    try:
        reach = 1
        while reach < length:
            # what `roll` wraps around is combined too, and dropped:
            # a tile's sides must be powers of two
            earlier = [np.roll(d, reach, self.axis) for d in data]
            joined = self.combine_fn.fn(
                *map(self.to_tensor, earlier, types), *map(self.to_tensor, data, types)
            )
            joined = joined if isinstance(joined, tuple) else (joined,)
            data = [
                np.where(place < reach, d, j.handle.data).astype(d.dtype)
                for d, j in zip(data, joined, strict=True)
            ]
            reach *= 2
    finally:
        tensor.__bool__ = truth
    return [self.to_tensor(d, t) for d, t in zip(data, types, strict=True)]


@contextmanager
def in_bounds(**tensors):
    """Stop a kernel of the block before it reads or writes outside these contiguous tensors.

    AssertionError says which places of which tensor it asked for.
    Without effect where kernels are compiled.
    """
    from triton import knobs
    from triton.runtime.interpreter import InterpreterBuilder

    if not knobs.runtime.interpret:
        yield
        return
    complaints, load, store = (
        [],
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def look(doing, addresses, mask):
        asked = addresses.data[mask.data].astype(np.int64)
        wrong = asked[~np.any([inside(asked, tensor) for tensor in tensors.values()], axis=0)]
        if wrong.size:
            complaints.append(f"the kernel {doing} {describe(wrong, tensors)}")
            raise IndexError(complaints[0])

    def careful_load(self, ptrs, mask, *rest):
        look("reads", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def careful_store(self, ptrs, value, mask, *rest):
        look("writes", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = careful_load
    InterpreterBuilder.create_masked_store = careful_store
    try:
        yield
    except Exception as error:
        if complaints:  # whatever the interpreter made of it
            raise AssertionError(complaints[0]) from error
        raise
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def inside(addresses, tensor):
    """Which of the addresses (n,), in bytes, lie in the tensor: (n,) bool."""
    first = tensor.data_ptr()
    return (addresses >= first) & (addresses < first + tensor.numel() * tensor.element_size())


def describe(wrong, tensors):
    """The first wrong address as a place in the tensor that it is nearest to.

    For example "x[100], and x has 100 numbers".
    """
    address = int(wrong.min())

    def distance(name):
        first = tensors[name].data_ptr()
        last = first + (tensors[name].numel() - 1) * tensors[name].element_size()
        return max(first - address, address - last)

    nearest = min(tensors, key=distance)
    tensor = tensors[nearest]
    place = (address - tensor.data_ptr()) // tensor.element_size()
    return f"{nearest}[{place}], and {nearest} has {tensor.numel()} numbers"
