"""A checkpoint of the trained parameters and of the optimizer, in one form for all engines and any number of ranks.

Every rank writes what it holds: parts of parameters laid out as vectors, and the same parts of their optimizer states,
each under its name and place. A rank that goes on, of whatever engine, reads the numbers that it is to hold from
whoever wrote them. Frozen weights are not in it: they are those that a run begins with.
"""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from kozero.errors import UserError

WEIGHT = "weight"
States = MutableMapping[torch.Tensor, dict[str, Any]]  # of an optimizer, by the tensor that it updates


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a parameter: numbers `first` to `first + num` of its `size` as a vector. They are those from
    `start` on of `owner`, the tensor that the optimizer updates. Where several ranks hold the same, one `writes` it."""

    name: str
    size: int
    owner: torch.Tensor
    first: int
    num: int
    start: int = 0
    writes: bool = True
    updates: bool = True

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """(num,) view of `owner` or of a state in its shape."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach().view(-1)[self.start : self.start + self.num]


def collect(pieces: Iterable[Piece], states: States) -> dict[str, torch.Tensor]:
    """What a rank writes, by NAME/FIRST/KIND: (num,) weights and states, and numbers such as the count of steps."""
    found = {}
    for piece in pieces:
        if piece.writes and piece.num:
            key = f"{piece.name}/{piece.first}"
            found[f"{key}/{WEIGHT}"] = piece.of(piece.owner)
            for kind, value in states.get(piece.owner, {}).items():
                found[f"{key}/{kind}"] = piece.of(value) if value.dim() else value.clone()
    return found


class Saved:
    """The files of a checkpoint, of which numbers are read when they are asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.parts: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        self.kinds: dict[str, set[str]] = {}
        for path in files:
            file = safe_open(path, "pt")
            for key in sorted(file.keys()):
                name, first, kind = key.rsplit("/", 2)
                self.parts.setdefault((name, kind), []).append((int(first), file, key))
                self.kinds.setdefault(name, set()).add(kind)

    def fill(self, piece: Piece, kind: str, into: torch.Tensor) -> None:
        """Numbers of a parameter or of one of its states.

        Raises: UserError unless all of them were written.
        """
        found = 0
        for first, file, key in self.parts.get((piece.name, kind), ()):
            part = file.get_slice(key)
            begin, end = max(first, piece.first), min(first + part.get_shape()[0], piece.first + piece.num)
            if begin < end:
                into[begin - piece.first : end - piece.first].copy_(part[begin - first : end - first])
                found += end - begin
        if found != piece.num:
            raise UserError(
                f"a checkpoint of another model: it holds {found:,} of {piece.num:,} numbers of {piece.name} ({kind})"
            )

    def number(self, name: str, kind: str) -> torch.Tensor | None:
        """() such as a count of steps; None for what is as large as the parameter."""
        _, file, key = self.parts[name, kind][0]
        return None if file.get_slice(key).get_shape() else file.get_tensor(key)

    def restore(self, pieces: Iterable[Piece], states: States) -> None:
        """Weights, and the states of what this rank's optimizer updates."""
        of_owner: dict[torch.Tensor, list[Piece]] = {}
        for piece in pieces:
            self.fill(piece, WEIGHT, piece.of(piece.owner))
            if piece.updates:
                of_owner.setdefault(piece.owner, []).append(piece)
        for owner, parts in of_owner.items():
            self.restore_states(owner, parts, states[owner])

    def restore_states(self, owner: torch.Tensor, pieces: list[Piece], states: dict[str, Any]) -> None:
        """The states of one owner, made where there are none yet. A parameter that never had a gradient has none."""
        kinds = {kind: [p for p in pieces if kind in self.kinds[p.name]] for p in pieces for kind in self.kinds[p.name]}
        del kinds[WEIGHT]
        for kind, parts in kinds.items():
            numbers = [self.number(piece.name, kind) for piece in parts]
            if numbers[0] is not None:
                states[kind] = max(numbers).to(owner.device)
                continue
            states[kind] = torch.zeros_like(owner)
            for piece in parts:
                self.fill(piece, kind, piece.of(states[kind]))
        for kind in set(states) - set(kinds):
            del states[kind]
