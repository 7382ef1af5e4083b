"""HTML as a browser would read it, for tests of pages and of the drawings in them."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = """</bdi></p><script>alert("x")</script><img src=x onerror='alert(1)'>&lt;{{ 7*7 }}"""


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, and the text inside them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "elements left open"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"attribute given twice in <{tag}>"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags: str) -> str:
        return " ".join(text for tag, text in self.texts if not tags or tag in tags)

    def after(self, header: str) -> list[str]:
        """The cells of the row that a header starts."""
        start = self.texts.index(("th", header)) + 1
        cells = []
        for tag, text in self.texts[start:]:
            if tag not in ("td", "bdi"):
                break
            cells.append(text)
        return cells
