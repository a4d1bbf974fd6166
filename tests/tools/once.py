"""A step of nbdev's, named in settings.ini (`procs`): what a page shows with its source
is not shown a second time, as a signature; a place to link to is left."""

import ast, re
from nbdev.process import Processor


class Once(Processor):
    "Runs last, on pages whose signatures stand before the cells they belong to."

    def begin(self):
        shown = set()
        for cell in self.nb.cells:
            if "exports" in getattr(cell, "directives_", {}):
                shown |= {getattr(x, "name", "") for x in ast.parse(cell.source).body}
        for cell in self.nb.cells:
            name = getattr(cell, "has_sd", False) and re.search(
                r"show_doc\(([\w.]+)", cell.source
            )
            # a method that is patched in stands as `Class.method`
            if name and name[1].split(".")[-1] in shown:
                cell.cell_type = "markdown"
                cell.source = f'<span id="{name[1].lower()}"></span>'
                for key in ("outputs", "execution_count", "has_sd"):
                    cell.pop(key, None)
