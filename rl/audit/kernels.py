"""What torch has for MPS, read from the list of operators that torch's own build is generated from.

A Linux wheel has no MPS kernel in its dispatcher, but the same `native_functions.yaml` that registers them on a Mac is
packaged with it (torchgen). What the list cannot say: whether a kernel takes every dtype and shape, and whether it is
right.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Status = Literal["kernel", "composite", "cpu fallback", "missing"]

# registered for MPS outside the list: torch's aten/src/ATen/mps/MPSFallback.mm sends these to the CPU and back whatever
# PYTORCH_ENABLE_MPS_FALLBACK says (its others, linalg_svd and col2im, have kernels of their own in this torch's list)
FALLBACKS = frozenset({"embedding_renorm_"})
# made of other operators, on every device
COMPOSITE = frozenset(
    {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
)


@dataclass(frozen=True)
class Entry:
    """One operator of the list: its dispatch keys and the operator whose structured kernel it shares, if any."""

    keys: frozenset[str]
    delegate: str | None


@cache
def entries() -> dict[str, Entry]:
    """Every operator of torch by name and overload ("add.Tensor"; "relu" for the default one)."""
    import torchgen
    import yaml

    source = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: dict[str, Entry] = {}
    for item in yaml.load(source.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        name, delegate = item["func"].partition("(")[0], item.get("structured_delegate")
        keys = frozenset(key.strip() for group in item.get("dispatch", {}) for key in group.split(","))
        if not keys and delegate is None:
            keys = frozenset({"CompositeImplicitAutograd"})  # what an entry without dispatch means
        found[name] = Entry(keys, delegate)
        for made in (item.get("autogen") or "").split(","):  # variants written by torchgen over this one
            if made.strip():
                found.setdefault(made.strip(), Entry(frozenset({"CompositeExplicitAutograd"}), name))
    return found


def status(name: str) -> Status:
    """What runs on MPS for an operator of `aten`, by its name in the list; "missing" for one that is not in it."""
    entry = entries().get(name)
    if entry is None:
        return "missing"
    delegate = entries().get(entry.delegate) if entry.delegate else None
    if "MPS" in entry.keys or (delegate is not None and "MPS" in delegate.keys and not entry.keys & COMPOSITE):
        return "kernel"
    if entry.keys & COMPOSITE or (delegate is not None and delegate.keys & COMPOSITE):
        return "composite"
    return "cpu fallback" if name in FALLBACKS else "missing"


def name_of(operator: Any) -> str:
    """The list's name of an `OpOverload`: "aten::relu.default" is "relu" there; another namespace keeps its own."""
    namespace, _, name = operator.name().partition("::")
    return name if namespace == "aten" else operator.name()
