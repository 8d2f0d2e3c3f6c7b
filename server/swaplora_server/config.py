"""What the operator decides: one frozen object, read once at start from flags, environment, a YAML file and defaults.

Imports no torch, so a wrong setting is refused before anything slow begins.
"""

import ipaddress
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from swaplora_server.config_values import (
    ApiKey,
    Dtype,
    Folder,
    HomePath,
    Listed,
    Origin,
    Prefix,
    ReplicaRange,
    RootPath,
    SharedAddress,
    Size,
    SizeOrAuto,
    SizeOrZero,
    Template,
    check_name,
    xdg_folder,
)

EMBEDDED = "embedded"
EMBEDDED_IDS = {EMBEDDED: "smollm2-135m-instruct", "embedded-minilm": "all-minilm-l6-v2"}
ENV_PREFIX = "SWAPLORA_"
CLIENT_VARIABLES = frozenset({"SWAPLORA_URL"})  # read by the client commands, so not a misspelt setting
FOREIGN_ADAPTER_DIRS = ("NIM_PEFT_SOURCE", "VLLM_LORA_RESOLVER_CACHE_DIR")
FOREIGN_RESCAN = "NIM_PEFT_REFRESH_INTERVAL"


class Settings(BaseSettings):
    """All that a server is started with. Sizes are bytes, times seconds; raises ValidationError, SettingsError."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    base: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        EMBEDDED, min_length=1, description="embedded (default), embedded-minilm, a local folder, or a hub id"
    )
    served_model_name: str | None = Field(None, pattern=r"^\S+$", description="What requests call the base")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs")
    dtype: Dtype = Field(
        "auto", description="Number format of the base: auto is what this machine is faster with, and loses nothing"
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto", description="What computes on a GPU: auto is Triton's kernels, and torch's operations where they fail"
    )
    quantization: Literal["int8", "nf4"] | None = Field(None, description="Keep the base's linears in 8 or 4 bits")
    tool_call_format: Literal["auto", "hermes", "llama3_json", "mistral", "qwen3_coder"] = Field(
        "auto", description="How the base writes calls of tools: auto is as its chat template does"
    )
    reasoning_format: Literal["auto", "think", "none"] = Field(
        "auto", description="How the base marks its reasoning: auto is as its chat template does; none leaves it in"
    )
    max_model_len: int | None = Field(
        None, ge=1, le=2**24, description="Longest context in tokens (default: the base's)"
    )

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one")
    api_key: Listed[ApiKey] = Field((), description="A key that admits a request")
    key_file: HomePath | None = Field(None, description="File of keys that swaplora keys makes")
    audit_log: HomePath | None = Field(None, description="File to note every change in that is asked for")
    tracing: bool = Field(False, description="Send OpenTelemetry's traces to OTEL_EXPORTER_OTLP_ENDPOINT")
    insecure_no_auth: bool = Field(False, description="Listen beyond this machine without a key")
    cors_allow_origin: Listed[Origin] = Field((), description="Whose web pages may ask: https://HOST, or * for all")
    allowed_host: Listed[str] = Field((), description="A name this server is called by: api.example.com")
    root_path: RootPath = Field("", description="Path below which a proxy serves this: /models")
    ui: bool = Field(True, description="Serve the page for browsers, at /ui")

    adapter: Listed[str] = Field((), description="An adapter folder")
    adapter_dir: Folder | None = Field(None, description="Folder whose sub-folders are adapters")
    adapter_rescan_seconds: float = Field(
        10, ge=0, le=86_400, description="Time between looks at --adapter-dir; 0 looks at start only"
    )
    allow_source: Listed[Prefix] = Field((), description="Where adapters may be fetched from: hf://ORG, s3://BUCKET")
    resolver: Template | None = Field(
        None, description="Where an adapter that is not here is fetched from: hf://ORG/{name}"
    )
    adapter_memory_bytes: Size = Field(4 * 2**30, description="Memory for resident adapters")
    host_adapter_bytes: SizeOrZero | None = Field(
        None, description="Host memory for adapters beside a GPU's (default: 4GiB)"
    )
    adapter_wait_seconds: float = Field(
        30, ge=0, le=86_400, description="Longest wait of a request for memory for its adapters"
    )
    max_adapter_bytes: Size = Field(2**30, description="Largest adapter to accept")
    keep_versions: int = Field(8, ge=1, le=10_000, description="Versions kept of each adapter")

    max_num_seqs: int = Field(64, ge=1, le=2**16, description="Most requests running at once")
    max_waiting: int = Field(256, ge=0, le=2**20, description="Most requests waiting; then 429")
    max_wait_seconds: float = Field(
        5, ge=0, le=86_400, description="Longest wait to be expected; then 429, if half as many wait as run"
    )
    max_batch_tokens: int = Field(512, ge=1, le=2**20, description="Most tokens in one step")
    max_step_ranks: int = Field(
        4096, ge=1, le=2**30, description="Most ranks of distinct adapters in one step (default 4096: 64 of rank 64)"
    )
    max_step_seconds: float = Field(
        300, gt=0, le=86_400, description="Longest step; the engine is stuck then, and all that runs ends with an error"
    )
    kv_cache_bytes: SizeOrAuto = Field(
        None, description="Memory for the KV cache (default: 1GiB, and on a GPU what is left of it)"
    )
    gpu_memory_fraction: float | None = Field(
        None, gt=0, le=1, description="Share of a GPU's memory to fill; the KV cache takes what is left (default: 0.9)"
    )
    cuda_graphs: bool | None = Field(
        None, description="Record a GPU's decoding steps at start, and replay them (default: on)"
    )
    block_size: int = Field(16, ge=1, le=1024, description="Tokens in a block of the KV cache")
    prefix_cache: bool = Field(True, description="Compute what prompts begin with in common once")

    max_body_bytes: Size = Field(32 * 2**20, description="Largest JSON body")
    body_memory_bytes: Size = Field(256 * 2**20, description="Memory for JSON bodies in all; then 429")
    tokenizer_threads: int = Field(2, ge=1, le=256, description="Threads for large bodies and long prompts")
    max_connections: int | None = Field(
        None, ge=1, le=2**20, description="Most connections (default 3/4 of the open files allowed, 4096 at most)"
    )
    keep_alive_seconds: float = Field(120, gt=0, le=86_400, description="Time a connection may rest between requests")
    head_seconds: float = Field(20, gt=0, le=86_400, description="Time a request's line and headers may take to come")
    stall_seconds: float = Field(
        30, gt=0, le=86_400, description="Time a client may rest while sending its body or reading"
    )
    min_bytes_per_second: int = Field(256, ge=1, le=2**30, description="Least it sends or reads, such rests aside")
    max_unread_bytes: Size = Field(4 * 2**20, description="Most of a stream that may lie unread")

    ray: bool = Field(False, description="Serve with replicas on Ray Serve, this process in front of them")
    ray_address: str | None = Field(None, description="Ray cluster to join: auto, HOST:PORT (default: one of its own)")
    ray_replicas: ReplicaRange | None = Field(None, description="Replicas: 2, or 1-4 for as many as are needed")
    ray_cpus: float | None = Field(None, gt=0, le=4096, description="CPUs of each replica (default: 1)")
    ray_gpus: float | None = Field(None, ge=0, le=64, description="GPUs of each replica (default: 0)")

    config: HomePath | None = Field(None, description="YAML file with settings, named as the flags")
    data_dir: HomePath = Field(
        default_factory=lambda: xdg_folder("XDG_DATA_HOME", ".local/share"), description="Uploaded adapters"
    )
    shared_store: SharedAddress | None = Field(
        None, description="Folder or s3://BUCKET/PREFIX through which servers share their adapters"
    )
    cache_dir: HomePath = Field(
        default_factory=lambda: xdg_folder("XDG_CACHE_HOME", ".cache"), description="Downloads and compiled code"
    )
    drain_seconds: float = Field(30, ge=0, le=86_400, description="Time to end requests at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged")
    log_json: bool = Field(False, description="Log one JSON object a line")

    @property
    def base_id(self) -> str:
        """What requests call the base: `served_model_name`, else the last part of the base's folder or hub id."""
        if self.served_model_name is not None:
            return self.served_model_name
        return EMBEDDED_IDS.get(self.base) or os.path.basename(os.path.abspath(self.base))

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """Name → folder of every adapter named one by one in `adapter`."""
        pairs = (entry.partition("=") for entry in self.adapter)
        return {name: Path(path).expanduser() for name, _, path in pairs}

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_key) or self.key_file is not None

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the address listened on."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host name: who can reach it is not known here
            return False

    @property
    def num_replicas(self) -> tuple[int, int]:
        """The fewest and the most on Ray Serve."""
        fewest, _, most = (self.ray_replicas or "1").partition("-")
        return int(fewest), int(most or fewest)

    @model_validator(mode="after")
    def _check_ray(self) -> Self:
        own = [name for name in type(self).model_fields if name.startswith("ray_")]
        given = [name for name in own if getattr(self, name) is not None]
        if given and not self.ray:
            raise ValueError(f"{given[0]}: it is for replicas on Ray Serve: give --ray as well, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        for entry in self.adapter:
            name, _, path = entry.partition("=")
            if not (name and path):
                raise ValueError(f"adapter: {entry!r} is not NAME=PATH")
            if name == self.base_id:
                raise ValueError(f"adapter: {name} is what the base is called; choose another name")
            check_name(name)
        if len(self.adapter_folders) < len(self.adapter):
            raise ValueError("adapter: a name is given twice; each adapter needs its own")
        for name, folder in self.adapter_folders.items():
            if not folder.is_dir():
                raise ValueError(f"adapter: {name}: {folder} is not a folder")
        return self

    @model_validator(mode="after")
    def _check_body_memory(self) -> Self:
        if self.body_memory_bytes < self.max_body_bytes:
            raise ValueError(
                f"body_memory_bytes: {self.body_memory_bytes} holds not even one body of max_body_bytes, "
                f"{self.max_body_bytes}: raise one or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        if not (self.is_loopback or self.has_keys or self.insecure_no_auth):
            raise ValueError(
                f"host: other machines can reach {self.host}, so requests need a key: name a --key-file, set --api-key "
                "(SWAPLORA_API_KEY), or --insecure-no-auth to let anyone in"
            )
        if "*" in self.cors_allow_origin and not (self.has_keys or self.insecure_no_auth):
            raise ValueError(
                "cors_allow_origin: * lets every web page ask, so requests need a key: name a --key-file, set "
                "--api-key (SWAPLORA_API_KEY), or --insecure-no-auth to let any page in"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """First wins: what is passed in, `SWAPLORA_*`, the YAML file, other servers' adapter folder variables."""
        config = init_settings().get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        from_file = _read_yaml(Path(config).expanduser()) if config else {}
        return (
            init_settings,
            _StrictEnvironment(settings_cls),
            InitSettingsSource(settings_cls, from_file),
            InitSettingsSource(settings_cls, _foreign_environment()),
        )


class _StrictEnvironment(EnvSettingsSource):
    """The `SWAPLORA_*` variables, with those that match no setting kept, so that `extra="forbid"` names them."""

    def __call__(self) -> dict[str, Any]:
        known = {self.env_prefix + name for name in self.settings_cls.model_fields} | CLIENT_VARIABLES
        given = {name.upper(): value for name, value in self.env_vars.items()}
        unknown = given.keys() - {name.upper() for name in known}
        return super().__call__() | {name: given[name] for name in unknown if name.startswith(self.env_prefix)}


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a config file. Raises SettingsError if there is no such file or it holds something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"config: {path} must be a mapping of setting to value")
    if "config" in content:
        raise SettingsError(f"config: {path} cannot name another config file")
    return {str(key): value for key, value in content.items()}


def _foreign_environment() -> dict[str, Any]:
    """The adapter folder as other servers' variables give it, so that a deployment of theirs starts unchanged."""
    folders = [folder for name in FOREIGN_ADAPTER_DIRS if (folder := os.environ.get(name))]
    rescan = os.environ.get(FOREIGN_RESCAN)
    return ({"adapter_dir": folders[0]} if folders else {}) | ({"adapter_rescan_seconds": rescan} if rescan else {})


def origins(settings: Settings, flags: Mapping[str, Any]) -> dict[str, str]:
    """Setting → where its value is from. `flags` are those that the settings were made with."""
    from_file = _read_yaml(settings.config) if settings.config else {}

    def origin(name: str) -> str:
        variable = f"{ENV_PREFIX}{name.upper()}"
        if name in flags:
            return "flag"
        if os.environ.get(variable):
            return variable
        if name in from_file:
            return str(settings.config)
        return "default" if name not in _foreign_environment() else "another server's variable"

    return {name: origin(name) for name in Settings.model_fields}


def complaints(error: ValidationError) -> list[str]:
    """One line for each thing wrong, saying what to change. Never shows a value, which may be a key."""
    return [_complaint(detail) for detail in error.errors(include_input=False, include_url=False)]


def _complaint(detail: Mapping[str, Any]) -> str:
    if not detail["loc"]:
        return str(detail["ctx"]["error"])
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return _unknown(name)
    reason = detail.get("ctx", {}).get("error") or detail["msg"]
    return f"{name}: {reason} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()} or {name} in the config file)"


def _unknown(name: str) -> str:
    prefix = ENV_PREFIX if name.startswith(ENV_PREFIX) else ""
    known = [prefix + (field.upper() if prefix else field) for field in Settings.model_fields]
    close = get_close_matches(name, known, n=1)
    return f"{name}: no such setting" + (f"; did you mean {close[0]}?" if close else "")
