"""The catalogue's tables, as each release has changed them."""

# Each script brings `user_version` one further. Never change one that was released: append.
MIGRATIONS = (
    """
    CREATE TABLE blobs (
        digest TEXT PRIMARY KEY,
        config_bytes INTEGER NOT NULL,
        weights_bytes INTEGER NOT NULL,
        failure TEXT
    ) STRICT;
    CREATE TABLE names (
        name TEXT PRIMARY KEY,
        current INTEGER,
        last_version INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE versions (
        name TEXT NOT NULL REFERENCES names,
        version INTEGER NOT NULL,
        digest TEXT NOT NULL REFERENCES blobs,
        rank INTEGER NOT NULL,
        targets TEXT NOT NULL,
        base_model TEXT,
        num_parameters INTEGER NOT NULL,
        created REAL NOT NULL,
        source TEXT NOT NULL,
        warnings TEXT NOT NULL,
        PRIMARY KEY (name, version)
    ) STRICT;
    CREATE INDEX versions_by_digest ON versions (digest);
    """,
    """
    ALTER TABLE names ADD COLUMN is_pinned INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE names ADD COLUMN origin TEXT;
    CREATE TABLE aliases (
        alias TEXT PRIMARY KEY,
        targets TEXT NOT NULL
    ) STRICT;
    """,
    "ALTER TABLE versions ADD COLUMN provenance TEXT;",
    """ALTER TABLE versions ADD COLUMN kinds TEXT NOT NULL DEFAULT '["lora"]';""",
    """
    ALTER TABLE names ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE names ADD COLUMN removed TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE aliases ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
    """,
    "ALTER TABLE names ADD COLUMN shared_with TEXT NOT NULL DEFAULT '[]';",
    "ALTER TABLE aliases ADD COLUMN mixing TEXT NOT NULL DEFAULT 'null';",
    """
    ALTER TABLE names ADD COLUMN gate TEXT;
    ALTER TABLE versions ADD COLUMN standing TEXT;
    ALTER TABLE versions ADD COLUMN verdict TEXT;
    """,
    "ALTER TABLE aliases ADD COLUMN canary TEXT NOT NULL DEFAULT 'null';",
    "ALTER TABLE blobs ADD COLUMN place TEXT;",
    "CREATE TABLE position (only INTEGER PRIMARY KEY CHECK (only = 0), revision INTEGER NOT NULL, change TEXT) STRICT;",
    "CREATE TABLE folders (name TEXT PRIMARY KEY, origin TEXT NOT NULL, digest TEXT NOT NULL) STRICT;",
)
