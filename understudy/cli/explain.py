"""`understudy complete --explain`: how a model picked each next word, drawn for a terminal 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from understudy.types import Attention, ExpertChoice, Piece, TokenTrace

WIDTH = 80
_BAR = 16
_NAME = 22
_ATTENDED = 4  # what fits a line
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, width: int = _BAR, plain: bool = False) -> str:
    """A bar of `share` (0 to 1) of `width` cells, to an eighth of a cell; whole `#` where only ASCII can be shown."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    if plain:
        return "#" * round(eighths / 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def percent(share: float) -> str:
    """Six characters or fewer; nothing where it was filtered out."""
    return "-" if share == 0 else "<0.1 %" if share < 0.001 else f"{share:.1%}".replace("%", " %")


def shown(text: str, token_id: int) -> str:
    """A token's text so that spaces and line ends can be seen; its id where its bytes are no whole characters."""
    return f"#{token_id}" if not text or "\ufffd" in text else repr(text)


class Explainer:
    """Draws tokens one by one. `prompt` are the texts of the prompt's tokens, where they are known."""

    def __init__(self, console: Console, prompt: Sequence[str] = ()) -> None:
        self._console = console
        self._prompt = prompt
        self._made: dict[int, list[str]] = {}  # texts of the answer's tokens, by sequence
        self._plain = not console.encoding.lower().startswith("utf")

    def piece(self, piece: Piece) -> None:
        """Draws every token of a piece."""
        if piece.echo:
            return
        traces = piece.trace.tokens if piece.trace is not None else ()
        for trace in traces:
            self._token(trace, self._made.setdefault(piece.index, []))
        if not traces and piece.text:
            self._console.print(piece.text, markup=False, highlight=False)

    def heading(self, text: str) -> None:
        self._console.print(text, style="bold", markup=False, highlight=False)

    def _token(self, trace: TokenTrace, made: list[str]) -> None:
        from rich.text import Text

        chosen = next((c for c in trace.candidates if c.token_id == trace.token_id), None)
        name = shown(chosen.text if chosen is not None else "", trace.token_id)
        at = len(made) + 1
        self._console.print(Text.assemble((f"token {at}  ", "dim"), (name, "bold green")))
        if trace.candidates:
            self._console.print(self._candidates(trace))
        for line in (*_experts(trace.experts), *self._attention(trace.attention, made)):
            self._console.print(line)
        self._console.print()
        made.append(chosen.text if chosen is not None else "")

    def _candidates(self, trace: TokenTrace) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=True, header_style="dim")
        table.add_column("", width=1)
        table.add_column("candidate", width=_NAME, no_wrap=True, overflow="ellipsis")
        for title in ("by the model", "as drawn"):
            table.add_column(title, width=_BAR, no_wrap=True)
            table.add_column("", width=7, justify="right", no_wrap=True)
        for c in trace.candidates:
            mine = c.token_id == trace.token_id
            style = "bold green" if mine else "dim" if c.after == 0 else ""
            table.add_row(
                Text(">" if mine else " ", style),
                Text(shown(c.text, c.token_id), style),
                Text(bar(c.before, plain=self._plain), "cyan"),
                Text(percent(c.before), style),
                Text(bar(c.after, plain=self._plain), "green"),
                Text(percent(c.after), style),
            )
        return table

    def _attention(self, layers: Sequence[Attention], made: Sequence[str]) -> Iterator[RenderableType]:
        """Each layer's most attended tokens, most attended first."""
        texts = [*self._prompt, *made]
        for layer in layers:
            seen = [i for i, weight in enumerate(layer.weights) if weight > 0]
            parts = []
            for i in sorted(seen, key=lambda i: -layer.weights[i])[:_ATTENDED]:
                position = layer.start + i
                known = texts[position] if self._prompt and position < len(texts) else ""
                parts.append(f"{repr(known) if known else f'position {position}'} {percent(layer.weights[i])}")
            yield _line(f"  layer {layer.layer} looked at ", "  ".join(parts))


def _experts(layers: Sequence[ExpertChoice]) -> Iterator[RenderableType]:
    """Two layers a line, where each names two experts."""
    cells = [
        f"layer {e.layer}: " + ", ".join(f"{x} {percent(w)}" for x, w in zip(e.experts, e.weights, strict=False))
        for e in layers
    ]
    wide = max(map(len, cells), default=0)
    per_line = max(1, (WIDTH - 10) // (wide + 3))
    for at in range(0, len(cells), per_line):
        lead = "  experts " if at == 0 else " " * 10
        yield _line(lead, "   ".join(c.ljust(wide) for c in cells[at : at + per_line]).rstrip())


def _line(lead: str, text: str) -> Text:
    from rich.text import Text

    line = Text.assemble((lead, "dim"), text)
    line.truncate(WIDTH, overflow="ellipsis")
    return line
