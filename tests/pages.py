"""Pages of the documentation, run as the programs that they are."""

import re


def run(page):
    """Runs the Python blocks of a page, one after the other as one program.

    Gives the names that it leaves behind and the number of its blocks.
    """
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(compile("\n".join(blocks), page.name, "exec"), names)
    return names, len(blocks)
