"""Triton's interpreter, made usable: scans that do not cost a Python call an element.

Without a GPU, `TRITON_INTERPRET=1` runs kernels in numpy. Nearly all of it is vectorised; only
`tl.associative_scan` calls its combine function once an element, about 0.1 ms each. Here the whole
tile is combined at once, in log2(length) rounds (Hillis and Steele 1986).
"""

import numpy as np


def fast_interpreter() -> bool:
    """Make `tl.associative_scan` fast in the interpreter, once a process; True where that is done.

    Without effect, and False, where kernels are compiled, or where this Triton's interpreter is
    built differently (seen to work: 3.4 to 3.9). A combine function that branches runs as before.
    """
    try:
        from triton import knobs
        from triton.runtime import interpreter

        slow, patch_tensor = interpreter.ScanOps.generic_scan, interpreter._patch_lang_tensor
    except (ImportError, AttributeError):
        return False
    if not knobs.runtime.interpret:
        return False
    if hasattr(slow, "slow"):
        return True

    def generic_scan(self, inputs):
        try:
            return scan(self, inputs)
        except Exception:  # noqa: BLE001  whatever it is, the interpreter's own way is right, or says what is wrong
            return slow(self, inputs)

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        # a number is an array of one element, which numpy 2.4 no longer turns into an int (Triton before 3.7)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    generic_scan.slow = slow
    interpreter.ScanOps.generic_scan = generic_scan
    interpreter._patch_lang_tensor = patch_lang_tensor
    return True


def scan(self, inputs):
    """What `ScanOps.generic_scan` returns: the tiles `inputs`, equal in shape, scanned along `self.axis`.

    Raises TypeError where the combine function asks whether a tile is true: a branch needs one number at a time.
    """
    data, types = [t.handle.data for t in inputs], [t.dtype for t in inputs]
    length = data[0].shape[self.axis]
    place = np.moveaxis(np.arange(length).reshape(length, *[1] * (data[0].ndim - 1)), 0, self.axis)
    tensor = type(inputs[0])
    truth, tensor.__bool__ = tensor.__bool__, None
    try:
        reach = 1
        while reach < length:
            # what `roll` wraps around is combined too, and dropped: a tile's sides must be powers of two
            earlier = [np.roll(d, reach, self.axis) for d in data]
            joined = self.combine_fn.fn(*map(self.to_tensor, earlier, types), *map(self.to_tensor, data, types))
            joined = joined if isinstance(joined, tuple) else (joined,)
            data = [np.where(place < reach, d, j.handle.data).astype(d.dtype)
                    for d, j in zip(data, joined, strict=True)]
            reach *= 2
    finally:
        tensor.__bool__ = truth
    return [self.to_tensor(d, t) for d, t in zip(data, types, strict=True)]
