"""Every speed claim as a ratio measured in one run, with the peers really run beside it.

python scripts/benchmark.py --size small          about a minute: shows that everything runs, checks no claim
python scripts/benchmark.py                       the claims, at their real size (about half an hour on 2 cores)
python scripts/benchmark.py --only import peers   some of them; the others stay in the JSON file as they were
python scripts/benchmark.py --data FOLDER         fine-tuning on glue_rte, glue_mrpc and hymenoptera of that folder
python scripts/benchmark.py --report FILE.md      also write the page of the documentation
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.comparisons import measure_comparison, measure_peers
from benchmarks.features import measure_closed_forms, measure_extraction, measure_imports
from benchmarks.finetuning import measure_pictures, measure_prefix, measure_text
from benchmarks.report import table_of, write_measurements, write_page
from benchmarks.resources import measure_attach, measure_memory
from benchmarks.setting import SIZES, Bench, timed
from rich.console import Console

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "import": measure_imports,
    "attach": measure_attach,
    "extraction": measure_extraction,
    "closed-forms": measure_closed_forms,
    "comparison": measure_comparison,
    "peers": measure_peers,
    "text": measure_text,
    "pictures": measure_pictures,
    "prefix": measure_prefix,
    "memory": measure_memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 where a claim does not hold.
    """
    asked = read_arguments(arguments)
    console = Console()
    path = asked.output / f"benchmark-{asked.size}.json"
    if asked.only_report:
        content = json.loads(path.read_text())
        console.print(f"[bold]written[/bold]  {write_page(asked.report, content)}", highlight=False)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SIZES[asked.size], Path(folder), console, asked.data)
        for bench.section in asked.only:
            console.print(f"[bold]{bench.section}[/bold]")
            with timed() as seconds:
                SECTIONS[bench.section](bench)
            console.print(f"  [dim]{seconds[0]:.0f} s[/dim]", highlight=False)
            content = write_measurements(path, asked.size, bench.found, asked.data)  # what is done is not lost
    console.print(table_of(bench.found))
    console.print(f"[bold]written[/bold]  {path}", highlight=False)
    if asked.report is not None:
        console.print(f"[bold]written[/bold]  {write_page(asked.report, content)}", highlight=False)
    return int(any(found.holds is False for found in bench.found))


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--data", type=Path, help="folder with glue_rte, glue_mrpc and hymenoptera")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="where the JSON file goes")
    parser.add_argument("--report", type=Path, help="Markdown file to write the measurements into")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, write the page from the JSON file")
    asked = parser.parse_args(arguments)
    if asked.only_report and asked.report is None:
        parser.error("--only-report needs --report FILE.md")
    asked.data = None if asked.data is None else asked.data.resolve()
    if asked.data is not None:
        missing = [name for name in ("glue_rte", "glue_mrpc", "hymenoptera") if not (asked.data / name).is_dir()]
        if missing:
            parser.error(f"--data {asked.data} has no folder {', '.join(missing)}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
