"""What makes the host wait for a GPU, counted on a CPU."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts operators, by name, while it lasts; `reads` are those whose result the host must wait for."""

    _READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(self.operators[name] for name in self._READS)
