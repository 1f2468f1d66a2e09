"""kind-edge.d.ts, by the TypeScript compiler itself: it is sound, an app's code fits it, it tells of what there is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "kind_edge" / "deploy" / "templates" / "web"
CONSUMER = ROOT / "tests" / "typescript" / "consumer.ts"
OPTIONS = ("--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext")
LIBRARIES = ("--lib", "es2022,dom", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess")
NAMES = """
import * as ts from "typescript";
const program = ts.default.createProgram(["kind-edge.d.ts"], {});
const file = program.getSourceFile("kind-edge.d.ts");
const checker = program.getTypeChecker();
const found = checker.getExportsOfModule(checker.getSymbolAtLocation(file));
const values = found.filter((symbol) => symbol.flags & ts.default.SymbolFlags.Value).map((symbol) => symbol.name);
const module = await import("./kind-edge.js");
console.log(JSON.stringify({ declared: values.sort(), exported: Object.keys(module).sort() }));
"""


@pytest.fixture(scope="module")
def app(typescript_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The web folder's own files beside a consumer, with the compiler in reach."""
    folder = tmp_path_factory.mktemp("app")
    for file in (*TEMPLATES.glob("*.js"), TEMPLATES / "kind-edge.d.ts", TEMPLATES / "package.json", CONSUMER):
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(typescript_folder / "node_modules")
    (folder / "names.mjs").write_text(NAMES)
    return folder


@pytest.mark.slow
def test_an_apps_code_compiles(app: Path) -> None:
    command = ["node", "node_modules/typescript/bin/tsc", *OPTIONS, *LIBRARIES, CONSUMER.name]
    done = subprocess.run(command, cwd=app, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_what_is_declared_is_what_is_exported(app: Path) -> None:
    done = subprocess.run(["node", "names.mjs"], cwd=app, capture_output=True, text=True, timeout=300, check=True)
    names = json.loads(done.stdout)
    assert names["declared"] == names["exported"]
