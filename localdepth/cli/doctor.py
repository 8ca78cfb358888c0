"""``doctor``: what is installed, what can run here."""

from rich.text import Text

from localdepth import console
from localdepth.cli.common import CHECK_FAILED, app, command
from localdepth.cli.options import JsonOption

__all__ = ["doctor"]


@app.command()
@command
def doctor(as_json: JsonOption = False) -> int:
    """Say what is installed, what can run here, and what to type for the rest."""
    from localdepth.doctor import examine  # takes 15 ms

    health = examine()
    if as_json:
        console.emit(health.to_dict())
    else:
        for finding in health.findings:
            mark = Text("ok  ", "green") if finding.good else Text("--  ", "yellow")
            console.say.print(Text.assemble(mark, (f"{finding.name}: ", "bold"), finding.seen))
            if finding.remedy:
                console.say.print(Text.assemble("      ", finding.remedy))
    return 0 if health.ready else CHECK_FAILED
