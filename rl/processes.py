"""The processes of one run that accelerate has started: which this one is, and what they agree on.

A run of its own (`python -m rl train` without `--accelerate`) is one process, and everything here then costs nothing.
Of several only the main one writes the run's folder and prints; each trains its share of the rows on a device of its
own. Ranks stop together: one that stopped alone would leave the others waiting in a collective for ever.

`rl.launch` starts them and reads what they leave in its control folder: `<rank>.pid` while they run, then
`<rank>.code`, and `<rank>.line` with what is to be told of an error.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files

if TYPE_CHECKING:
    import torch

CONTROL = "DUET_CONTROL"
COMMAND = "DUET_COMMAND"
LONGEST_WAIT = timedelta(days=2)  # the main process measures while the others wait
INTERRUPTED = 130


def launched() -> bool:
    """Whether `rl.launch` started this process."""
    return CONTROL in os.environ


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def rank() -> int:
    """This one's number; 0 is the main one."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def is_main() -> bool:
    """Whether this process writes the run's folder."""
    return rank() == 0


def begin() -> None:
    """Tell the launcher who this is, and take one card: torch and MLX both then find it as their first."""
    files.write_text(_control() / f"{rank()}.pid", str(os.getpid()))
    if count() > 1 and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        number = int(os.environ.get("LOCAL_RANK", "0"))
        seen = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number] if number < len(seen) else str(number)
        os.environ["LOCAL_RANK"] = "0"


def end(code: int, line: str | None) -> int:
    """Leave `code` and the `line` about an error for the launcher; returns `code`.

    The first process to leave takes all others with it, so the others wait until the main one has written the run.
    """
    control, told = _control(), f"{line}\n" if line else ""
    if not is_main():
        patience = 10.0 if code not in (0, INTERRUPTED) else float("inf")
        begun = time.monotonic()
        while not (control / "0.code").exists() and time.monotonic() - begun < patience:
            time.sleep(0.05)
    if told:
        files.write_text(control / f"{rank()}.line", told)
    files.write_text(control / f"{rank()}.code", str(code))
    return code


def join(device: "torch.device") -> None:
    """Meet the others, before anything is made that all of them need."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others: what it makes there they find."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def share[T](make: Callable[[], T]) -> T:
    """What `make` gives on the main process, on all of them."""
    if count() == 1:
        return make()
    import torch

    held: list[Any] = [make() if is_main() else None]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    return bool(_reduced(int(flag), "MAX")) if count() > 1 else flag


def total(number: int) -> int:
    """The sum of every process's `number`."""
    return _reduced(number, "SUM") if count() > 1 else number


def sharded() -> bool:
    """Whether FSDP spreads the weights over the processes."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def loading_place(device: "torch.device") -> "torch.device":
    """Where a policy is loaded: in memory where it is then spread over the cards, since one may not hold it."""
    import torch

    return torch.device("cpu") if sharded() else device


def each(args: dict[str, Any]) -> str:
    """The rows that each process takes of an optimizer step, for people."""
    rows = args.get("per_device_train_batch_size", 8) * args.get("gradient_accumulation_steps", 1)
    return f"{rows} rows of a step" + (" and a part of the weights" if sharded() else "")


def inputs() -> dict[str, Any]:
    """What several processes add to a run's inputs: they sum in another order and draw from other streams."""
    return {} if count() == 1 else {"processes": {"count": count(), "sharded": sharded()}}


def whole_weights(model: Any) -> dict[str, "torch.Tensor"] | None:
    """Trained weights that FSDP has spread over the processes, whole and on the CPU of the main one; {} on others.

    None where each process holds all weights itself.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if count() == 1 or not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            value = weight.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value  # every process takes part
            if is_main():
                found[name] = value.cpu()
    return found


def _reduced(number: int, how: str) -> int:
    import torch
    from accelerate import PartialState

    held = torch.tensor(number, dtype=torch.long, device=PartialState().device)
    torch.distributed.all_reduce(held, op=getattr(torch.distributed.ReduceOp, how))
    return int(held)


def _control() -> Path:
    return Path(os.environ[CONTROL])
