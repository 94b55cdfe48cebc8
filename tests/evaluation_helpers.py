"""What several tests of the evaluation share."""

import json

from odcft.progress import Progress


class RecordedProgress(Progress):
    """Keeps the lines it is told to print."""

    def __init__(self):
        super().__init__(every=0)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def strict_json(text):
    """Parse JSON, refusing NaN and Infinity."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)
