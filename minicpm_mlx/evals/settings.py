"""Settings of an evaluation run, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..arguments import check_limits, limited, one_of, shown
from ..engine import WIDTH, Sampling
from ..errors import InvalidArgumentError
from .task import Task
from .tasks import TASKS

ALL = tuple(name for name in TASKS if name != "bbh_cot")
"""The columns of the published table."""
MODES = ("gen", "ppl", "both")
SAMPLINGS = ("greedy", "ultraeval")


THOUGHT = 4096
"""Tokens of the longest thought, where thinking is asked for without a limit."""


def check_thinking(think: bool | None, think_tokens: int | None, chat_template: bool) -> None:
    """Raises InvalidArgumentError for thinking without the template that has a place for it."""
    given = "think" if think is not None else "think_tokens" if think_tokens is not None else None
    if given and not chat_template:
        raise InvalidArgumentError("goes with the chat template; ask for that too", field=given)
    if think is False and think_tokens is not None:
        raise InvalidArgumentError(
            "contradicts thinking being switched off; leave one out", field="think_tokens"
        )


class TaskPart(NamedTuple):
    """A task in one mode: a part of a run."""

    task: Task
    mode: str

    @property
    def name(self) -> str:
        return f"{self.task.name}.{self.mode}"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of a run; InvalidArgumentError for impossible ones."""

    tasks: tuple[str, ...] = ALL
    """Names, as in `tasks.TASKS`; "all" for the columns of the published table."""
    mode: str = "gen"
    """"gen" (scores generated replies), "ppl" (compares options) or "both"; in "both" a task
    without "ppl" runs in "gen"."""
    limit: int | None = limited(None, whole=True, least=1)
    """Most questions of a subset, drawn by the seed; a lower limit draws a part of a higher one's.
    None: all."""
    subjects: tuple[str, ...] = ()
    """Subsets to run, of the tasks that have any; empty: all."""
    shots: int | None = limited(None, whole=True, least=0)
    """Few-shot examples before a question in "gen"; None: as many as UltraEval."""
    sampling: str = "greedy"
    """"greedy", or "ultraeval": UltraEval's temperature and top_p for each task."""
    seed: int = limited(0, whole=True, least=0)
    """Draws questions, examples and sampled tokens."""
    chat_template: bool = False
    """Ask each question as a user message in the model's template; UltraEval uses none."""
    think: bool | None = None
    """With the chat template: think before each answer, or not; None leaves it to the template. The
    answer alone is scored."""
    think_tokens: int | None = limited(None, whole=True, least=0)
    """Longest thought, for which a reply has that much more room; None with `think`: THOUGHT."""
    whole_replies: bool = False
    """Generate replies to their end, also where the score is decided earlier."""
    allow_code: bool = False
    """Run programs that the model writes, in the sandbox."""
    width: int = limited(WIDTH, whole=True, least=1)
    """Replies generated at a time; changes no reply."""
    parts: tuple[TaskPart, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("sampling", SAMPLINGS)):
            one_of(name, getattr(self, name), choices)
        check_limits(self)
        check_thinking(self.think, self.think_tokens, self.chat_template)
        if self.think and self.think_tokens is None:
            object.__setattr__(self, "think_tokens", THOUGHT)
        parts = tuple(part for name in self._task_names() for part in self._parts_of(name))
        object.__setattr__(self, "parts", parts)
        self._check_parts()

    def _task_names(self) -> tuple[str, ...]:
        names = [name for task in self.tasks for name in (ALL if task == "all" else (task,))]
        for name in names:
            if name not in TASKS:
                raise InvalidArgumentError(
                    f"must be of {', '.join(TASKS)} or all, got {shown(name)}", field="tasks"
                )
        if not names:
            raise InvalidArgumentError(f"must name some, such as {ALL[-1]}", field="tasks")
        return tuple(dict.fromkeys(names))

    def _parts_of(self, name: str) -> list[TaskPart]:
        task = TASKS[name]
        if self.mode == "both":
            return [TaskPart(task, mode) for mode in task.modes]
        if self.mode not in task.modes:
            capable = ", ".join(name for name, other in TASKS.items() if self.mode in other.modes)
            raise InvalidArgumentError(
                f"{self.mode} is for {capable}; {name} has no options to compare: mode both runs "
                "the others in gen",
                field="mode",
            )
        return [TaskPart(task, self.mode)]

    def _check_parts(self) -> None:
        code = [part.task.name for part in self.parts if part.task.needs_code]
        if code and not self.allow_code:
            raise InvalidArgumentError(
                f"{' and '.join(code)}: these tasks run programs that the model writes, in a "
                "sandbox; allow it with --allow-code (allow_code=True), or leave them out"
            )
        gen_only = {
            "shots": self.shots is not None,
            "sampling": self.sampling != "greedy",
            "chat_template": self.chat_template,
            "whole_replies": self.whole_replies,
        }
        if all(part.mode == "ppl" for part in self.parts) and any(gen_only.values()):
            raise InvalidArgumentError(
                "is for mode gen; ppl asks each question alone and compares its options, without a "
                "reply",
                field=next(name for name in gen_only if gen_only[name]),
            )

    def of(self, part: TaskPart) -> dict[str, Any]:
        """The settings that a part's scores depend on, for its record."""
        settings: dict[str, Any] = {
            "mode": part.mode,
            "shots": part.task.few_shot[part.mode],
            "limit": self.limit,
            "seed": self.seed,
        }
        subsets = part.task.source.subsets
        if any(subsets):
            settings["subjects"] = [subject for subject in self.subjects if subject in subsets]
        if part.mode == "gen":
            sampling = self.sampling_of(part.task)
            if self.shots is not None:
                settings["shots"] = self.shots
            settings |= {
                "chat_template": self.chat_template,
                "sampling": self.sampling,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": part.task.max_tokens,
                "whole_replies": self.whole_replies,
            }
            thinking = {"think": self.think, "think_tokens": self.think_tokens}
            settings |= {name: value for name, value in thinking.items() if value is not None}
        return settings

    def sampling_of(self, task: Task) -> Sampling:
        """The sampling of a task's replies, without the seed."""
        return task.sampling if self.sampling == "ultraeval" else Sampling()


def sentence(settings: Mapping[str, Any]) -> str:
    """The settings of a part, as `EvalSettings.of` returns them, for people."""
    shots = settings["shots"]
    words = [settings["mode"], f"{shots} example{'s' * (shots != 1)}"]
    if settings["mode"] == "gen":
        sampling = "greedy"
        if settings["temperature"]:
            sampling = f"temperature {settings['temperature']}, top_p {settings['top_p']}"
        template = "chat template" if settings["chat_template"] else "no chat template"
        words += [sampling, f"at most {settings['max_tokens']} tokens", template]
        words += ["whole replies"] if settings["whole_replies"] else []
        if (think := settings.get("think")) is not None:
            words.append("thinking" if think else "not thinking")
        if (most := settings.get("think_tokens")) is not None:
            words.append(f"thoughts of at most {most} tokens")
    if settings["limit"] is not None:
        words.append(f"at most {settings['limit']} questions of a subset")
    if settings.get("subjects"):
        words.append(f"of {', '.join(settings['subjects'])}")
    return ", ".join([*words, f"seed {settings['seed']}"])
