"""Where an adapter can come from, written as a URI: a hub repository, a prefix in an object store, a folder."""

import re
from dataclasses import dataclass

from swaplora_adapters.errors import SourceNotAllowedError
from swaplora_adapters.files.complaints import quoted

HUB, OBJECT_STORE, FOLDER = "hf://", "s3://", "file:"
FORMS = "hf://ORG/REPO[@REVISION][/FOLDER], s3://BUCKET/PREFIX or file:FOLDER"
PLACE = "{name}"  # in a resolver's template
MAX_URI_CHARS = 512
_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class HubUri:
    """A folder of a hub repository at a revision."""

    org: str
    name: str
    revision: str
    folders: tuple[str, ...]

    @property
    def repo(self) -> str:
        """As the hub calls it."""
        return f"{self.org}/{self.name}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What an allowed prefix is compared with."""
        return (HUB, self.org, self.name)

    def at(self, revision: str) -> "HubUri":
        """The same folder at another revision."""
        return HubUri(self.org, self.name, revision, self.folders)

    def __str__(self) -> str:
        return HUB + "/".join((self.org, f"{self.name}@{self.revision}", *self.folders))


@dataclass(frozen=True, slots=True)
class ObjectUri:
    """What lies under a prefix of a bucket."""

    bucket: str
    folders: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """What an allowed prefix is compared with."""
        return (OBJECT_STORE, self.bucket, *self.folders)

    def key(self, file: str) -> str:
        """The key of a file under the prefix."""
        return "/".join((*self.folders, file))

    def __str__(self) -> str:
        return OBJECT_STORE + "/".join((self.bucket, *self.folders))


@dataclass(frozen=True, slots=True)
class FolderUri:
    """A folder, relative to the adapter folder or absolute."""

    path: str

    def __str__(self) -> str:
        """Shows of an absolute path no more than its last part."""
        return f"{FOLDER}.../{self.path.rpartition('/')[2]}" if self.path.startswith("/") else FOLDER + self.path


Uri = HubUri | ObjectUri | FolderUri


def uri_of(path_or_uri: str) -> str:
    """The URI that is meant: what names no scheme is the path of a folder."""
    if path_or_uri.startswith((HUB, OBJECT_STORE, FOLDER)):
        return path_or_uri
    return FOLDER + (path_or_uri.rstrip("/") or path_or_uri)


def parse_uri(text: str) -> Uri:
    """Read a URI strictly. Raises SourceNotAllowedError, which repeats nothing of what may hold a password."""
    scheme, rest = split_scheme(text)
    if scheme == FOLDER:
        _check_parts(rest.removeprefix("/").split("/"))
        return FolderUri(rest)
    parts = tuple(rest.split("/"))
    _check_parts(parts)
    return _hub_uri(parts) if scheme == HUB else _object_uri(parts)


def parse_prefix(text: str) -> tuple[str, ...]:
    """The parts of a prefix that an operator allows: hf://, hf://ORG, hf://ORG/REPO, s3://BUCKET, s3://BUCKET/PREFIX.

    Raises SourceNotAllowedError.
    """
    scheme, rest = split_scheme(text)
    rest = rest.removesuffix("/")
    if scheme == FOLDER:
        raise SourceNotAllowedError(f"{quoted(text)} cannot be a prefix: folders are allowed by --adapter-dir")
    parts = tuple(rest.split("/")) if rest or scheme == OBJECT_STORE else ()
    _check_parts(parts)
    if scheme == OBJECT_STORE:
        _check(_BUCKET, parts[0], "a bucket")
    elif len(parts) > 2:
        raise SourceNotAllowedError(f"{quoted(text)} goes too deep: allow hf://, hf://ORG or hf://ORG/REPO")
    else:
        _check_names(parts)
    return (scheme, *parts)


def check_template(template: str) -> str:
    """Return a source with `PLACE` in it once as it is. Raises SourceNotAllowedError for anything else."""
    if template.startswith(FOLDER):
        raise SourceNotAllowedError(f"{quoted(template)}: folders need no template; --adapter-dir is looked at first")
    if template.count(PLACE) != 1:
        raise SourceNotAllowedError(f"{quoted(template)} must have {PLACE} in it once")
    parse_uri(template.replace(PLACE, "name"))
    return template


def split_scheme(text: str) -> tuple[str, str]:
    """The scheme and what follows it. Raises SourceNotAllowedError, also for characters that no source may have."""
    if len(text) > MAX_URI_CHARS:
        raise SourceNotAllowedError(f"a source has at most {MAX_URI_CHARS} characters")
    if not text.isprintable() or any(char in text for char in "\\?#"):
        raise SourceNotAllowedError("a source has no control characters, no backslash, no query and no fragment")
    for scheme in (HUB, OBJECT_STORE, FOLDER):
        if text.startswith(scheme) and "://" not in text.removeprefix(scheme):
            return scheme, text.removeprefix(scheme)
    raise SourceNotAllowedError(f"an adapter's source is written {FORMS}")


def _hub_uri(parts: tuple[str, ...]) -> HubUri:
    if len(parts) < 2:
        raise SourceNotAllowedError("a hub source names a repository: hf://ORG/REPO[@REVISION][/FOLDER]")
    name, separator, revision = parts[1].partition("@")
    _check_names((parts[0], name))
    if separator:
        _check(_REVISION, revision, "a revision (one with a slash is given by its commit)")
        _check_parts((revision,))
    return HubUri(parts[0], name, revision or "main", parts[2:])


def _object_uri(parts: tuple[str, ...]) -> ObjectUri:
    if len(parts) < 2:
        raise SourceNotAllowedError("an object store's source names a bucket and a prefix: s3://BUCKET/PREFIX")
    _check(_BUCKET, parts[0], "a bucket")
    return ObjectUri(parts[0], parts[1:])


def _check_parts(parts: tuple[str, ...] | list[str]) -> None:
    if any(part in ("", ".", "..") for part in parts):
        raise SourceNotAllowedError("a source has no empty part, no '.' and no '..'")


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        _check(_HUB_NAME, name, "an organisation or repository")


def _check(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise SourceNotAllowedError(f"the source does not name {what} as it should: {pattern.pattern} is wanted")
