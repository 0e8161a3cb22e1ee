"""One exception tree. Only `cli/__init__.py` turns it into an exit code.

HominemError            2   anything we can explain
├── InputError          2   a file or a setting that a person can mend: names file, line, field, value, way out
├── ConfigError         2   a key or a value in a TOML file or an override
├── RegistryError       2   an artifact is missing, damaged or of the wrong kind
├── BusyError           2   somebody else holds the lock; names the holder
├── ModelError          2   a model cannot be found, downloaded or used for this
├── TeacherError        2   the teacher cannot be reached or was not configured
├── TrainingError       2   training had to stop; the last good state is kept
└── NotGoodEnough       1   judged, and refused
"""


class HominemError(Exception):
    """Base of everything this library raises on purpose; the message says what, where and what to do."""

    exit_code = 2


class InputError(HominemError):
    """Every problem found in one file at once, one line each.

    Args:
        problems: sentences such as `labels.jsonl:41: empathy = 1.7 is outside [-1, 1]; fix the row`.
    """

    SHOWN = 40  # a file of garbage should not scroll the reason away

    def __init__(self, problems):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems[: self.SHOWN]
        if len(self.problems) > self.SHOWN:
            lines.append(f"... and {len(self.problems) - self.SHOWN} more")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        return (type(self), (self.problems,))


class ConfigError(InputError):
    """A configuration key or value that cannot be right."""


class RegistryError(HominemError):
    """An artifact is missing, damaged, or not what was asked for."""


class BusyError(HominemError):
    """A lock is held by another process."""


class ModelError(HominemError):
    """A model cannot be found, downloaded, or used in this role."""


class TeacherError(HominemError):
    """The teacher is not configured or cannot be reached."""


class NoAnswer(TeacherError):
    """The teacher has no usable answer to one question; the message is the reason kept with the open item."""


class TrainingError(HominemError):
    """Training stopped; the last good state is on disk."""


class NotGoodEnough(HominemError):
    """The result was measured and refused."""

    exit_code = 1
