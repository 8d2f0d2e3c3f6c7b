"""`swaplora doctor`: what a server started with these settings would find, and what of it costs speed."""

from typing import Annotated, Any

import typer

from swaplora_server.cli.common import AsJson, say, show_json
from swaplora_server.cli.settings import read_settings


def doctor(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument()] = None,
    *,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Look at the machine and the settings as a server would: what costs speed, what would end the start.

    Takes the flags of serve. Ends with 1 only if a server with these settings could not start.
    """
    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ()) and name != "as_json"}
    settings = read_settings(given)
    from swaplora_server.config import origins
    from swaplora_server.doctor.disk import disk_findings
    from swaplora_server.doctor.finding import Effect
    from swaplora_server.doctor.machine import machine_findings
    from swaplora_server.doctor.software import software_findings

    findings = [*machine_findings(settings), *software_findings(settings), *disk_findings(settings)]
    values, whence = settings.model_dump(mode="json"), origins(settings, given)  # keys are dumped as stars
    if as_json:
        shown = {name: {"value": values[name], "from": whence[name]} for name in values}
        show_json({"findings": [finding._asdict() for finding in findings], "settings": shown})
    else:
        for finding in findings:
            say(f"{finding.effect:5} {finding.subject}: {finding.found}")
            if finding.remark:
                say(f"      {finding.remark}")
        for name, origin in whence.items():
            if origin != "default":
                say(f"      {name} = {values[name]} ({origin})")
    if any(finding.effect is Effect.FAILS for finding in findings):
        raise typer.Exit(1)
