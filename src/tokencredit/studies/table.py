"""The studies that there are: a new one is a folder and a line here."""

from __future__ import annotations

from pathlib import Path

from tokencredit.studies.attribution.question import STUDY as ATTRIBUTION
from tokencredit.studies.compare.question import STUDY as COMPARE
from tokencredit.studies.correlation.question import STUDY as CORRELATION
from tokencredit.studies.entropy.question import STUDY as ENTROPY
from tokencredit.studies.inspect.question import STUDY as INSPECT
from tokencredit.studies.kernel.question import STUDY as KERNEL
from tokencredit.studies.noise_scale.question import STUDY as NOISE_SCALE
from tokencredit.studies.preference.question import STUDY as PREFERENCE
from tokencredit.studies.result import study_name
from tokencredit.studies.study import Study
from tokencredit.studies.variance.question import STUDY as VARIANCE

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (CORRELATION, COMPARE, VARIANCE, PREFERENCE, ENTROPY, ATTRIBUTION, NOISE_SCALE, KERNEL, INSPECT)
}


def study_in(directory: str | Path) -> Study | None:
    """The study whose result a directory holds, of this version or an earlier one; None where it holds none."""
    return STUDIES.get(study_name(directory) or "")
