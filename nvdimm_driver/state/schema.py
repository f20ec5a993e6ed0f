# SPDX-License-Identifier: Apache-2.0
"""The ledger's tables, and the SQL that upgrades each version of the schema to the next.

doc/ledger.rst describes every column. ``real_path`` and ``real_paths`` are functions of :mod:`.state.database`.
"""

SCHEMAS = (
    """
CREATE TABLE domain (
    uuid TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    ram INTEGER NOT NULL,
    fault TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE allocation (
    uuid TEXT NOT NULL REFERENCES domain(uuid) ON DELETE CASCADE,
    slot INTEGER NOT NULL,
    path TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    label_size INTEGER NOT NULL,
    alignsize INTEGER,
    fixed_base INTEGER,
    node INTEGER,
    pmem INTEGER NOT NULL,
    kind TEXT, device TEXT, start INTEGER, inode INTEGER, generation INTEGER, file_size INTEGER,
    base INTEGER,
    written INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (uuid, slot)
) STRICT;
CREATE TABLE attachment (
    uuid TEXT PRIMARY KEY REFERENCES domain(uuid) ON DELETE CASCADE,
    state TEXT NOT NULL CHECK (state IN ('preparing', 'prepared', 'mapping', 'mapped')),
    domid INTEGER,
    boot_id TEXT NOT NULL,
    since INTEGER NOT NULL,
    qemu TEXT NOT NULL DEFAULT '',
    gfn_start INTEGER NOT NULL DEFAULT 0,
    gfn_limit INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE frozen (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    path TEXT NOT NULL,
    PRIMARY KEY (uuid, path)
) STRICT;
CREATE TABLE mapping (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    gfn INTEGER NOT NULL, mfn INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (uuid, gfn)
) STRICT;
CREATE TABLE area (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    mfn INTEGER NOT NULL, count INTEGER NOT NULL
) STRICT;
""",
    """
ALTER TABLE domain ADD COLUMN dsm TEXT;
ALTER TABLE attachment ADD COLUMN served TEXT NOT NULL DEFAULT '';
ALTER TABLE attachment ADD COLUMN ioreq_server INTEGER;
CREATE TABLE uncached (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    gfn INTEGER NOT NULL, count INTEGER NOT NULL
) STRICT;
""",
    """
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    uuid TEXT NOT NULL,
    name TEXT NOT NULL,
    domid INTEGER,
    detail TEXT NOT NULL
) STRICT;
CREATE TABLE counter (
    name TEXT NOT NULL,
    label TEXT NOT NULL,
    value REAL NOT NULL,
    PRIMARY KEY (name, label)
) STRICT;
""",
    """
ALTER TABLE attachment ADD COLUMN number INTEGER;
ALTER TABLE attachment ADD COLUMN nvdimms TEXT NOT NULL DEFAULT '';
ALTER TABLE attachment ADD COLUMN written TEXT NOT NULL DEFAULT '';
ALTER TABLE attachment ADD COLUMN ended INTEGER NOT NULL DEFAULT 0;
CREATE TABLE run (
    uuid TEXT PRIMARY KEY REFERENCES domain(uuid) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    nvdimms TEXT NOT NULL,
    written TEXT NOT NULL
) STRICT;
""",
    # Earlier versions kept paths as users wrote them, with symbolic links. What no identity tells apart stays as it is.
    """
UPDATE OR IGNORE allocation SET path = real_path(path) WHERE kind IS NOT NULL;
UPDATE OR IGNORE frozen SET path = real_path(path);
UPDATE run SET nvdimms = real_paths(nvdimms);
UPDATE attachment SET nvdimms = real_paths(nvdimms);
""",
    """
ALTER TABLE attachment ADD COLUMN id TEXT NOT NULL DEFAULT '';
CREATE TABLE intent (
    uuid TEXT NOT NULL REFERENCES domain(uuid) ON DELETE CASCADE,
    slot INTEGER NOT NULL,
    path TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    label_size INTEGER NOT NULL,
    alignsize INTEGER,
    fixed_base INTEGER,
    node INTEGER,
    pmem INTEGER NOT NULL,
    written INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (uuid, slot)
) STRICT;
""",
    # A guest whose run has no number may be saved, and must be told from one whose run the ledger has lost.
    """
CREATE TABLE unnumbered (
    uuid TEXT PRIMARY KEY REFERENCES domain(uuid) ON DELETE CASCADE
) STRICT;
INSERT INTO unnumbered SELECT uuid FROM domain WHERE uuid NOT IN (SELECT uuid FROM run);
""",
    "ALTER TABLE unnumbered ADD COLUMN spoiled INTEGER NOT NULL DEFAULT 0;\n",
    """
ALTER TABLE domain ADD COLUMN changed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE allocation ADD COLUMN changed INTEGER NOT NULL DEFAULT 0;
""",
    # Before, what a start had and its domain had not any more was given up, at the latest, when that was last changed.
    """
CREATE TABLE latest (changed INTEGER NOT NULL) STRICT;
INSERT INTO latest SELECT coalesce(max(changed), 0) FROM domain;
ALTER TABLE allocation ADD COLUMN wipes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE allocation ADD COLUMN overwritten INTEGER NOT NULL DEFAULT 0;
ALTER TABLE frozen ADD COLUMN given_up INTEGER;
UPDATE frozen SET given_up = (SELECT nullif(changed, 0) FROM domain WHERE uuid = frozen.uuid)
    WHERE path NOT IN (SELECT path FROM allocation WHERE uuid = frozen.uuid);
""",
    """
ALTER TABLE latest ADD COLUMN file TEXT NOT NULL DEFAULT '';
ALTER TABLE allocation ADD COLUMN renamed_from TEXT NOT NULL DEFAULT '';
""",
    """
ALTER TABLE latest ADD COLUMN id TEXT NOT NULL DEFAULT '';
ALTER TABLE latest ADD COLUMN writes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE latest ADD COLUMN uncompared INTEGER NOT NULL DEFAULT 0;
ALTER TABLE allocation ADD COLUMN pool TEXT NOT NULL DEFAULT '';
ALTER TABLE allocation ADD COLUMN doubtful INTEGER NOT NULL DEFAULT 0;
""",
    """
ALTER TABLE allocation ADD COLUMN deleted INTEGER NOT NULL DEFAULT 0;
CREATE TABLE never_run (
    uuid TEXT NOT NULL REFERENCES domain(uuid) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    PRIMARY KEY (uuid, number)
) STRICT;
""",
    """
ALTER TABLE domain ADD COLUMN cache TEXT;
ALTER TABLE attachment ADD COLUMN cache TEXT NOT NULL DEFAULT '';
""",
    """
ALTER TABLE domain ADD COLUMN hot_slots INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attachment ADD COLUMN hot_slots INTEGER NOT NULL DEFAULT 0;
""",
)
"""The SQL that makes each version of the schema from the one before; the first is version 1."""
