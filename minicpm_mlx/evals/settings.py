"""What is to be measured, and how; checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..arguments import at_least_one, shown, whole
from ..engine import WIDTH, Sampling
from ..errors import InvalidArgumentError
from .task import Task
from .tasks import TASKS

__all__ = ["ALL", "MODES", "SAMPLINGS", "EvalSettings", "TaskPart"]

ALL = tuple(name for name in TASKS if name != "bbh_cot")
"""The columns of the published table."""
MODES = ("gen", "ppl", "both")
SAMPLINGS = ("greedy", "ultraeval")


class TaskPart(NamedTuple):
    """A task in one mode."""

    task: Task
    mode: str

    @property
    def name(self) -> str:
        return f"{self.task.name}.{self.mode}"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What a run is asked for; InvalidArgumentError where that cannot be."""

    tasks: tuple[str, ...] = ALL
    """Names, as of `tasks.TASKS`; "all" for the columns of the published table."""
    mode: str = "gen"
    """"gen" (replies are read), "ppl" (options are compared) or "both"; in "both" a task that has
    no "ppl" is done in "gen"."""
    limit: int | None = None
    """Most questions of a subset, drawn by the seed; fewer are among those of more. None: all."""
    subjects: tuple[str, ...] = ()
    """Of the sets that have subsets only these; none: all."""
    shots: int | None = None
    """Examples before a question in "gen"; None: as many as UltraEval."""
    sampling: str = "greedy"
    """"greedy", or "ultraeval": temperature and top_p as UltraEval has them for each set."""
    seed: int = 0
    """Which questions and examples are drawn, and what is sampled."""
    chat_template: bool = False
    """Ask each question as a user's message in the model's template; UltraEval has none."""
    whole_replies: bool = False
    """Have replies made to their end, also where the score is decided before."""
    allow_code: bool = False
    """Run programs that the model writes, shut in (see `sandbox`)."""
    width: int = WIDTH
    """Replies made at once; it changes no reply."""
    parts: tuple[TaskPart, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("sampling", self.sampling, SAMPLINGS),
        ):
            if value not in known:
                raise InvalidArgumentError(
                    f"{name} must be one of {', '.join(known)}, got {shown(value)}"
                )
        for name, count in (("limit", self.limit), ("width (--batch)", self.width)):
            if count is not None:
                at_least_one(name, count)
        for name, least in (("seed", self.seed), ("shots", self.shots)):
            if least is not None and whole(name, least) < 0:
                raise InvalidArgumentError(f"{name} must be 0 or more, got {shown(least)}")
        parts = tuple(part for name in self._names() for part in self._parts_of(name))
        object.__setattr__(self, "parts", parts)
        self._check_parts()

    def _names(self) -> tuple[str, ...]:
        names = [name for given in self.tasks for name in (ALL if given == "all" else (given,))]
        for name in names:
            if name not in TASKS:
                raise InvalidArgumentError(
                    f"tasks must be of {', '.join(TASKS)} or all, got {shown(name)}"
                )
        if not names:
            raise InvalidArgumentError(f"expected tasks, such as {ALL[-1]}, got none")
        return tuple(dict.fromkeys(names))

    def _parts_of(self, name: str) -> list[TaskPart]:
        task = TASKS[name]
        if self.mode == "both":
            return [TaskPart(task, mode) for mode in task.modes]
        if self.mode not in task.modes:
            able = ", ".join(name for name, each in TASKS.items() if self.mode in each.modes)
            raise InvalidArgumentError(
                f"{name} has no options to compare: mode {self.mode} is for {able}; "
                "use mode both to have the others in gen"
            )
        return [TaskPart(task, self.mode)]

    def _check_parts(self) -> None:
        code = [part.task.name for part in self.parts if part.task.needs_code]
        if code and not self.allow_code:
            raise InvalidArgumentError(
                f"{' and '.join(code)}: programs that the model writes are run, shut in; say "
                "--allow-code (allow_code=True), or leave them out"
            )
        asked = {
            "shots": self.shots is not None,
            "sampling": self.sampling != "greedy",
            "chat_template": self.chat_template,
            "whole_replies": self.whole_replies,
        }
        if all(part.mode == "ppl" for part in self.parts) and any(asked.values()):
            raise InvalidArgumentError(
                f"{next(name for name in asked if asked[name])}: for mode gen; in ppl a question "
                "stands alone and its options are compared, without a reply"
            )

    def of(self, part: TaskPart) -> dict[str, Any]:
        """What a part's scores depend on, for its record."""
        found: dict[str, Any] = {
            "mode": part.mode,
            "shots": part.task.shots[part.mode],
            "limit": self.limit,
            "seed": self.seed,
        }
        subsets = part.task.source.subsets
        if any(subsets):
            found["subjects"] = [subject for subject in self.subjects if subject in subsets]
        if part.mode == "gen":
            how = self.sampling_of(part.task)
            if self.shots is not None:
                found["shots"] = self.shots
            found |= {
                "chat_template": self.chat_template,
                "sampling": self.sampling,
                "temperature": how.temperature,
                "top_p": how.top_p,
                "max_tokens": part.task.max_tokens,
                "whole_replies": self.whole_replies,
            }
        return found

    def sampling_of(self, task: Task) -> Sampling:
        """How the replies of a task are drawn, but for the seed."""
        return task.settings if self.sampling == "ultraeval" else Sampling()


def sentence(settings: Mapping[str, Any]) -> str:
    """What `EvalSettings.of` says, for people."""
    shots = settings["shots"]
    words = [settings["mode"], f"{shots} example{'s' * (shots != 1)}"]
    if settings["mode"] == "gen":
        drawn = "greedy"
        if settings["temperature"]:
            drawn = f"temperature {settings['temperature']}, top_p {settings['top_p']}"
        template = "chat template" if settings["chat_template"] else "no chat template"
        words += [drawn, f"at most {settings['max_tokens']} tokens", template]
        words += ["whole replies"] if settings["whole_replies"] else []
    if settings["limit"] is not None:
        words.append(f"at most {settings['limit']} questions of a subset")
    if settings.get("subjects"):
        words.append(f"of {', '.join(settings['subjects'])}")
    return ", ".join([*words, f"seed {settings['seed']}"])
