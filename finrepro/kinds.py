"""The kinds: where their modules are, each checked against its contract and bound to settings."""

import difflib
import importlib
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_args, get_type_hints

from finrepro import contracts
from finrepro.errors import UsageError, unknown
from finrepro.settings import Choice, build

# Where the modules of each kind are, and their contracts; the file name is the `kind`.
HOMES = {
    "adapters": "finrepro.methods.adapters",
    "quantizers": "finrepro.methods.quantizers",
    "optimizers": "finrepro.methods.optimizers",
    "datasets": "finrepro.data.formats",
    "tasks": "finrepro.evaluation.tasks",
    "report": "finrepro.reporting.tables",
}
CONTRACTS: dict[str, Any] = {
    "adapters": contracts.Adapter,
    "quantizers": contracts.Quantizer,
    "optimizers": contracts.OptimizerKind,
    "datasets": contracts.DatasetFormat,
    "tasks": contracts.TaskFamily,
    "report": contracts.Report,
    "computed report": contracts.ComputedReport,
}
BOUND = "config"  # the settings, an attribute that a contract has and no module defines
SIMILAR = 0.8  # of difflib's ratio: from here on a name is a misspelt one of the contract


def adapter_of(choice: Choice) -> contracts.Adapter:
    """An adapter, bound to its settings."""
    return _bound("adapters", choice)


def quantizer_of(choice: Choice) -> contracts.Quantizer:
    """A quantizer, bound to its settings."""
    return _bound("quantizers", choice)


def optimizer_of(choice: Choice) -> contracts.OptimizerKind:
    """An optimizer's method, bound to its settings."""
    return _bound("optimizers", choice)


def format_of(choice: Choice) -> contracts.DatasetFormat:
    """The format of a dataset, bound to the dataset's settings."""
    return _bound("datasets", choice)


def task_of(choice: Choice) -> contracts.TaskFamily:
    """A task's family, bound to the task's settings."""
    return _bound("tasks", choice)


def report_of(name: str, where: str = "") -> contracts.Report:
    """The report of a table of cells."""
    return implementation("report", name, where)()


def computed_report_of(name: str, where: str = "") -> contracts.ComputedReport:
    """The report of a table that is computed from models' sizes."""
    return implementation("report", name, where, "computed report")()


def choose(package: str, name: str, entry: Any, where: str) -> Choice:
    """Resolve one catalogue entry: check its kind, reject unknown settings, build the typed
    `Config`.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise UsageError(f"{where}: needs 'kind', one of {', '.join(kinds(package))}.")
    method = implementation(package, entry["kind"], where)
    values = {key: value for key, value in entry.items() if key != "kind"}
    return Choice(name=name, kind=entry["kind"], config=build(method.Config, values, where))


@cache
def kinds(package: str) -> tuple[str, ...]:
    """Names of the modules in the home of `package`: the values that `kind` may take there."""
    parent = importlib.import_module(HOMES[package])
    return tuple(sorted(info.name for info in pkgutil.iter_modules(parent.__path__)))


def kind_module(package: str, kind: str, where: str = "") -> ModuleType:
    """The module that implements `kind`. Raises `UsageError` naming the allowed kinds."""
    if kind not in kinds(package):
        prefix = f"{where}: " if where else ""
        raise UsageError(f"{prefix}{unknown('kind', kind, kinds(package))}")
    name = f"{HOMES[package]}.{kind}"
    return sys.modules.get(name) or importlib.import_module(name)  # asked for ten times a cell


def implementation(package: str, kind: str, where: str = "", contract: str = "") -> type[Any]:
    """A kind as a class of its contract (`CONTRACTS`, by default that of `package`): called with
    settings it is a bound method, uncalled it has the kind's constants.

    Raises `UsageError` for a module that does not fulfil the contract.
    """
    module = kind_module(package, kind, where)
    return _class_of(module, contract or package)


@cache
def _class_of(module: ModuleType, contract: str) -> type[Any]:
    """The contract's defaults, with what the module defines in their place."""
    demanded = members(CONTRACTS[contract])
    if complaint := _complaint(module, demanded):
        file = module.__name__.replace(".", "/")
        raise UsageError(f"{file}.py does not fulfil the contract of {contract}: {complaint}.")
    namespace: dict[str, Any] = {"__doc__": module.__doc__, "__init__": _take_settings}
    for name in demanded.keys() & vars(module).keys():
        value = vars(module)[name]
        namespace[name] = _method(module, name) if inspect.isroutine(value) else value
    name, bases = module.__name__.rpartition(".")[2], (CONTRACTS[contract],)
    return types.new_class(name, bases, exec_body=lambda body: body.update(namespace))


def _bound(package: str, choice: Choice) -> Any:
    return implementation(package, choice.kind)(choice.config)


def _take_settings(self: Any, config: Any = None) -> None:
    self.config = config


def _method(module: ModuleType, name: str) -> Callable[..., Any]:
    """The module's function as a method that passes its settings as `config`.

    The function is looked up at each call, so that a test can replace it in the module.
    """
    parameters = list(inspect.signature(vars(module)[name]).parameters)
    if BOUND not in parameters:
        return lambda _, *args, **kwargs: vars(module)[name](*args, **kwargs)
    place = parameters.index(BOUND)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) < place:
            return vars(module)[name](*args, **kwargs, config=self.config)
        return vars(module)[name](*args[:place], self.config, *args[place:], **kwargs)

    return method


@dataclass(frozen=True)
class Member:
    """A name of a contract. `parameters` are a function's, None for a constant; the last `optional`
    of them have a default.
    """

    required: bool
    parameters: tuple[str, ...] | None
    optional: int = 0

    def accepts(self, parameters: tuple[str, ...]) -> bool:
        """Whether these are the contract's, but for some of the optional ones."""
        assert self.parameters is not None
        fewest = len(self.parameters) - self.optional
        return self.parameters[: max(fewest, len(parameters))] == parameters


@cache
def members(contract: type[Any]) -> dict[str, Member]:
    """The names of a contract, those that it inherits among them."""
    by_name = {}
    for name, annotation in get_type_hints(contract).items():
        function = next((kind for kind in get_args(annotation) if _is_callable_type(kind)), None)
        required = not hasattr(contract, name)
        by_name[name] = _member(function.__call__, required) if function else Member(required, None)
    for parent in contract.__mro__:
        for name, value in vars(parent).items():
            if not name.startswith("_") and inspect.isfunction(value) and name not in by_name:
                by_name[name] = _member(value, name in contract.__abstractmethods__)
    return {name: by_name[name] for name in by_name if name != BOUND}


def _is_callable_type(annotation: Any) -> bool:
    return inspect.isclass(annotation) and "__call__" in vars(annotation)


def _member(function: Callable[..., Any], required: bool) -> Member:
    parameters = list(inspect.signature(function).parameters.values())[1:]  # without self
    optional = sum(parameter.default is not parameter.empty for parameter in parameters)
    return Member(required, tuple(parameter.name for parameter in parameters), optional)


def _complaint(module: ModuleType, demanded: dict[str, Member]) -> str | None:
    """The first name that is missing, misspelt or takes other parameters; None if none is.

    A public name of the module's own that is similar to an absent name of the contract is taken for
    a misspelling of it: a helper needs another name, or a leading underscore.
    """
    present = {name: value for name, value in vars(module).items() if name in demanded}
    own = [name for name, value in vars(module).items() if _is_own(module, name, value)]
    absent = {name.casefold(): name for name in demanded if name not in present}
    for name in own:
        near = difflib.get_close_matches(name.casefold(), absent, n=1, cutoff=SIMILAR)
        if name not in demanded and near:
            return f"'{name}' is no name of it; did you mean '{absent[near[0]]}'?"
    for name, member in demanded.items():
        if name not in present and member.required:
            return f"it has no '{_written(name, member)}'"
        value = present.get(name)
        if inspect.isroutine(value) and member.parameters is not None:
            parameters = _parameters(value, member.parameters)
            if not member.accepts(
                tuple(parameter for parameter in parameters if parameter != BOUND)
            ):
                return (
                    f"'{name}({', '.join(parameters)})' has to be '{_written(name, member)}', with "
                    f"'{BOUND}' anywhere among them or not at all"
                )
        elif value is not None and (member.parameters is None) == inspect.isroutine(value):
            expected = "constant" if member.parameters is None else "function"
            return f"'{name}' has to be a {expected}"
    return None


def _is_own(module: ModuleType, name: str, value: Any) -> bool:
    """Whether a public name is defined in the module, and not imported."""
    if name.startswith("_") or isinstance(value, ModuleType):
        return False
    return getattr(value, "__module__", module.__name__) == module.__name__


def _parameters(function: Any, demanded: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a function's parameters, without further ones that have a default."""
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name in (*demanded, BOUND) or parameter.default is parameter.empty
    )


def _written(name: str, member: Member) -> str:
    return name if member.parameters is None else f"{name}({', '.join(member.parameters)})"
