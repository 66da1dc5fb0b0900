"""What an artifact can be: a target and a form, and everything that follows from the two.

    gguf  merged    the delta is in the weights
          sidecar   the delta is a file beside the base, which is not part of the artifact
    onnx  merged    the delta is in the weights
          branch    the delta is constants behind the weights
          adapter   the delta fills slots of the graph, out of a file that the caller may leave out

Code asks a form what it implies and compares no names.
"""

from __future__ import annotations

from dataclasses import dataclass

from safegene_runtime.errors import Problem, UnsupportedError

__all__ = [
    "FORMS",
    "GGUF",
    "GGUF_MERGED",
    "GGUF_SIDECAR",
    "ONNX",
    "ONNX_ADAPTER",
    "ONNX_BRANCH",
    "ONNX_MERGED",
    "TARGETS",
    "Form",
    "Target",
    "find_form",
    "form_named",
    "forms_of",
    "names_of_forms",
    "target_named",
]


@dataclass(frozen=True)
class Target:
    """A format that artifacts are made in.

    Attributes:
        name: as in manifests and `--to`.
        title: as people write it.
        options: of a conversion, those that only this target has.
        types: what the option `type` may say; None: any that the target's encoder knows.
        adapter_file: what the file of a delta is called, where it is one of its own.
        model_file: what a model is called; None: as in the base.
    """

    name: str
    title: str
    options: tuple[str, ...]
    types: tuple[str, ...] | None
    adapter_file: str
    model_file: str | None


@dataclass(frozen=True)
class Form:
    """How an artifact carries the delta.

    Attributes:
        target: what it is made in.
        name: as in manifests and `--as`.
        roles: of the files that it must have.
        merges: whether weights of the base change, so that the delta may not survive.
        ignores: options of a conversion that mean nothing here.
        has_slots: whether the graph leaves the factors open, and an adapter file fills them.
    """

    target: Target
    name: str
    roles: tuple[str, ...]
    merges: bool = False
    ignores: tuple[str, ...] = ()
    has_slots: bool = False

    def __str__(self) -> str:
        return f"{self.target.name} {self.name}"

    @property
    def carries_base(self) -> bool:
        """Whether the artifact runs on its own; else it needs its base beside it."""
        return "model" in self.roles

    @property
    def has_adapter(self) -> bool:
        """Whether the delta is a file of its own, so that the plain base can be run as well."""
        return "adapter" in self.roles


GGUF = Target(
    "gguf", "GGUF", ("imatrix", "llama_cpp"), None, adapter_file="adapter.gguf",
    model_file="model.gguf",
)  # fmt: skip
ONNX = Target(
    "onnx", "ONNX", ("precision", "block_size", "accuracy_level", "builder_options"),
    ("auto", "keep"), adapter_file="adapter.onnx_adapter", model_file=None,
)  # fmt: skip
TARGETS = (GGUF, ONNX)

GGUF_MERGED = Form(GGUF, "merged", ("model",), merges=True)
GGUF_SIDECAR = Form(GGUF, "sidecar", ("adapter",), ignores=("promote", "imatrix"))
ONNX_MERGED = Form(ONNX, "merged", ("model",), merges=True)
ONNX_BRANCH = Form(ONNX, "branch", ("model",))
ONNX_ADAPTER = Form(ONNX, "adapter", ("model", "adapter"), has_slots=True)
FORMS = (GGUF_MERGED, GGUF_SIDECAR, ONNX_MERGED, ONNX_BRANCH, ONNX_ADAPTER)


def target_named(name: str) -> Target:
    """The target of this name.

    Raises:
        UnsupportedError: there is none.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    raise UnsupportedError(
        Problem("--to", "target", " or ".join(one.name for one in TARGETS), name, "choose one")
    )


def forms_of(target: Target) -> tuple[Form, ...]:
    """The forms of a target, the usual one first."""
    return tuple(form for form in FORMS if form.target is target)


def find_form(target: object, name: object) -> Form | None:
    """The form of these names, if there is one."""
    return next((form for form in FORMS if (form.target.name, form.name) == (target, name)), None)


def form_named(target: Target, name: str) -> Form:
    """The form of a target.

    Raises:
        UnsupportedError: it has no form of this name.
    """
    found = find_form(target.name, name)
    if found is None:
        known = " or ".join(form.name for form in forms_of(target))
        raise UnsupportedError(
            Problem("--as", f"form of --to {target.name}", known, name, "choose one of these")
        )
    return found


def names_of_forms() -> tuple[str, ...]:
    """What `--as` may say, over all targets."""
    return tuple(dict.fromkeys(form.name for form in FORMS))
