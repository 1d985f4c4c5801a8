"""What an option makes of a command: --zip, --merge, --list and --prune, --dry-run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prgkit.chain import Session
from prgkit.files import readable_bytes

if TYPE_CHECKING:
    from prgkit.recipe import Recipe


def pack_bundle(session: Session, bundle: Path, manifest: dict[str, Any], *, asked: bool) -> dict[str, Any]:
    """Pack a bundle and say what was left out; where it was not asked for, say of an older archive that it is one."""
    from prgkit.export.packing import archive_of, is_packed_bundle, left_out, pack

    if not asked:
        if is_packed_bundle(archive := archive_of(bundle, manifest)):
            session.terminal.note(f"{archive.name} is still the bundle before this one; --zip packs it again")
        return {}
    archive = pack(bundle)
    if others := left_out(bundle):
        session.terminal.note(f"{archive.name}: without {', '.join(others)}, which this machine made or you put there")
    return {"zip": str(archive), "zip_bytes": archive.stat().st_size}


def merge_reports(session: Session, reports: tuple[Path, ...], out: Path) -> dict[str, Any]:
    """Lay the reports of several benches side by side."""
    from prgkit.evaluate.merge import merge
    from prgkit.evaluate.tables import comparison_table

    found = merge(reports, out=out, command="prgkit " + shlex.join(sys.argv[1:]))
    session.terminal.show(comparison_table(found))
    session.terminal.say("comparison: ", (str(out / "comparison.html"), "bold"))
    return found


def keep_house(session: Session, root: Path, *, prune: bool, rehearse: bool) -> dict[str, Any]:
    """List the stores, or free those that nothing uses."""
    from prgkit import stores

    rows = stores.prune(root, rehearse=rehearse) if prune else stores.list_stores(root)
    if rows:
        session.terminal.listing(stores.told(rows))
    if prune:
        freed = readable_bytes(sum(row["bytes"] for row in rows))
        session.terminal.say(f"{freed} would be freed" if rehearse else f"{freed} freed")
    elif not rows:
        session.terminal.say(f"there is no target store in {root}")
    return {"freed" if prune else "stores": rows}


def rehearse(session: Session, recipe: Recipe, folder: Path, targets_root: Path) -> dict[str, Any]:
    """Print what a distillation would take."""
    session.rehearses = True
    if not session.leads:
        return {}
    from prgkit.estimate import estimate

    expected = estimate(recipe, folder, targets_root, session.terminal)
    session.terminal.listing({"run": str(folder), **expected["told"]})
    return {"run": str(folder), **expected}
