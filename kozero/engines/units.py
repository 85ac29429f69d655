"""Which parts of a module are gathered by themselves when parameters are sharded, and compiled by themselves."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

COMPILER = "inductor"


def compile_layers(module: nn.Module) -> None:
    """Let torch.compile have each layer, in place, so that names stay. Layers of one kind share what is compiled."""
    for siblings, name in layers(module):
        siblings[int(name)].compile(backend=COMPILER)


def layers(module: nn.Module) -> list[tuple[nn.ModuleList, str]]:
    """The members of module lists that can be units of their own, as (list, name in it). The rest is the root's.

    A member that shares a parameter with anything outside it is none: the root stays gathered while its parts run,
    so weights that layers share and tied weights belong there. Lists are searched from the outside in, and not inside
    a unit: a part that one rank does not call (an expert without tokens) must not be gathered by itself, for the
    other ranks would wait.
    """
    return list(search(module, parameter_uses(module)))


def search(module: nn.Module, uses: Counter) -> Iterator[tuple[nn.ModuleList, str]]:
    """The units below `module`."""
    for name, part in module.named_children():
        own = parameter_uses(part)
        if isinstance(module, nn.ModuleList) and own and all(uses[key] == times for key, times in own.items()):
            yield module, name
        else:
            yield from search(part, uses)


def parameter_uses(module: nn.Module) -> Counter:
    """How many times each parameter, by its identity, is registered in a module."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
