"""The page: markup, style and script as one document that needs nothing from outside.

Invariant: a browser runs the page's own script and talks to its own server, and nothing else; the
page holds no data, and asks for a key before it shows any.
"""

import base64
import hashlib
from importlib.resources import files

from fastapi.responses import HTMLResponse

_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def response() -> HTMLResponse:
    """The whole page with its headers."""
    folder = files("serve").joinpath("templates")
    parts = {
        name: folder.joinpath(file).read_text()
        for name, file in (("css", "dashboard.css"), ("script", "dashboard.js"))
    }
    html = folder.joinpath("dashboard.html").read_text()
    for name, text in parts.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    digest = base64.b64encode(hashlib.sha256(parts["script"].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers=_SECURITY | {"Content-Security-Policy": policy})
