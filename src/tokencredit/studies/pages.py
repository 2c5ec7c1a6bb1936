"""One page of many directories: the runs of every task apart, then pivotality runs and studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokencredit import report
from tokencredit.report.section import Section
from tokencredit.studies import pivots as measured
from tokencredit.studies.learning import apart, comparable, compare_and_say
from tokencredit.studies.table import study_in


def write_page(directories: Sequence[Path], out: Path, *, title: str = "tokencredit report") -> Path:
    """The page of runs, studies and pivotality runs, as `find_runs` finds them.

    Runs are compared with those of the same task, model and evaluation, and with no others: where there are several
    such groups, every group has sections of its own. ValueError names a study that has not finished; RunError says
    which runs of one group are no seeds of one method.
    """
    runs, studies, pivots = apart(directories)
    groups = comparable(runs)
    found = [(name, report.sections(paths, compare_and_say(paths))) for name, paths in groups.items()]
    named = found if len(found) == 1 else [(name, _grouped(name, some)) for name, some in found]
    sections = [section for _, some in named for section in some] + sections_of([*pivots, *studies])
    return report.write_sections(sections, out, title=title)


def sections_of(directories: Sequence[Path]) -> list[Section]:
    """The sections of several finished studies and pivotality runs; where there is more than one, titles begin with the
    directory.
    """
    found = [(directory, _sections(directory)) for directory in directories]
    if len(found) == 1:
        return found[0][1]
    return [section for directory, some in found for section in _grouped(str(directory), some)]


def _sections(directory: Path) -> list[Section]:
    study = study_in(directory)
    return study.sections(directory) if study else measured.sections(directory)


def _grouped(name: str, sections: Sequence[Section]) -> list[Section]:
    return [replace(section, group=name) for section in sections]
