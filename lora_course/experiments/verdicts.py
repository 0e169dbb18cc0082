"""Verdicts on what people say about LoRA, recomputed from the committed results.

One rule, `judge`, decides: the interval that five seeds give for a true value, against the region
where that value lies if the saying holds. Nothing is typed in.
"""

from contextlib import suppress
from typing import NamedTuple

from lora_course.experiments.answers import NoVerdict
from lora_course.experiments.change import load_changes
from lora_course.experiments.forgetting import load_forgetting
from lora_course.experiments.geometry import load_geometry
from lora_course.experiments.questions import Difference
from lora_course.experiments.runs import load_results
from lora_course.experiments.sayings import CANT_TELL, SAYINGS, Measure, Recorded, Region, Saying

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"


def load_recorded() -> Recorded:
    return Recorded(load_results(), load_changes(), load_forgetting(), load_geometry())


def judge(interval: Difference, region: Region) -> str:
    """Reproduced if the whole interval lies in the region, not reproduced if it lies wholly
    outside, otherwise these seeds can't tell."""
    if region.low <= interval.low and interval.high <= region.high:
        return REPRODUCED
    outside = interval.high < region.low or interval.low > region.high
    return NOT_REPRODUCED if outside else CANT_TELL


class Verdict(NamedTuple):
    theme: str
    says: str
    source: str
    reported: str
    measured: str
    verdict: str
    why: str


def verdict_of(saying: Saying, recorded: Recorded) -> Verdict:
    """Measure and judge one saying. Of several measures the worst decides: a saying that promises
    more can fail in more ways."""
    shown, found, missing = [], [], None
    for measure in saying.measures:
        try:
            interval = measure.interval(recorded)
        except NoVerdict as reason:
            missing = missing or reason
            continue
        shown.append(f"{measure.words}: {interval}")
        found.append((judge(interval, measure.region), measure))
    if saying.beside:
        with suppress(NoVerdict):
            shown.append(saying.beside(recorded))
    verdict, why = missing.args if missing else _decided(found)
    note = f". {saying.note}" if saying.note else ""
    says = (saying.theme, saying.says, saying.source, saying.reported)
    return Verdict(*says, "; ".join(shown), verdict, why + note)


def _decided(found: list[tuple[str, Measure]]) -> tuple[str, str]:
    """The worst verdict, and the measures that gave it."""
    worst = next(v for v in (NOT_REPRODUCED, CANT_TELL, REPRODUCED) if v in dict(found))
    deciding = [measure for verdict, measure in found if verdict == worst]
    regions = " and ".join(dict.fromkeys(measure.region.words for measure in deciding))
    if worst == REPRODUCED:
        return worst, f"as said: {regions}"
    names = "; ".join(measure.words for measure in deciding)
    how = "wholly outside" if worst == NOT_REPRODUCED else "across the limit of"
    return worst, f"{how} “{regions}”: {names}"


def verdicts(recorded: Recorded | None = None) -> list[Verdict]:
    """Every saying measured and judged, from the committed results unless others are given."""
    recorded = recorded or load_recorded()
    return [verdict_of(saying, recorded) for saying in SAYINGS]
