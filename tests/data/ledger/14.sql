BEGIN TRANSACTION;
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
    written INTEGER NOT NULL DEFAULT 0, changed INTEGER NOT NULL DEFAULT 0, wipes INTEGER NOT NULL DEFAULT 0, overwritten INTEGER NOT NULL DEFAULT 0, renamed_from TEXT NOT NULL DEFAULT '', pool TEXT NOT NULL DEFAULT '', doubtful INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (uuid, slot)
) STRICT;
INSERT INTO "allocation" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',0,'/mnt/pmem0/db1.img',1073741824,131072,2097152,NULL,0,1,'fsdax','6a1f',1048576,12,4294967295,1073741824,73014444032,100,1700000000000000000,1,0,'','',0,0);
INSERT INTO "allocation" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',3,'/dev/dax1.0',536870912,0,NULL,77309411328,NULL,0,'devdax','9b2e',0,0,0,536870912,77309411328,100,1700000000000000000,0,0,'/dev/dax0.0','fast',1,1);
INSERT INTO "allocation" VALUES('5dea22b3-1d52-d8f3-2516-782e98ab3fa0',0,'/mnt/pmem0/two.img',2097152,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,40,0,0,0,'','',0,0);
CREATE TABLE area (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    mfn INTEGER NOT NULL, count INTEGER NOT NULL
) STRICT;
INSERT INTO "area" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',1311232,262144);
CREATE TABLE attachment (
    uuid TEXT PRIMARY KEY REFERENCES domain(uuid) ON DELETE CASCADE,
    state TEXT NOT NULL CHECK (state IN ('preparing', 'prepared', 'mapping', 'mapped')),
    domid INTEGER,
    boot_id TEXT NOT NULL,
    since INTEGER NOT NULL,
    qemu TEXT NOT NULL DEFAULT '',
    gfn_start INTEGER NOT NULL DEFAULT 0,
    gfn_limit INTEGER NOT NULL DEFAULT 0
, served TEXT NOT NULL DEFAULT '', ioreq_server INTEGER, number INTEGER, nvdimms TEXT NOT NULL DEFAULT '', written TEXT NOT NULL DEFAULT '', ended INTEGER NOT NULL DEFAULT 0, id TEXT NOT NULL DEFAULT '', cache TEXT NOT NULL DEFAULT '') STRICT;
INSERT INTO "attachment" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0','mapped',7,'b0',1700000000,'/usr/libexec/xen-qemu-system-i386',17825792,68719476736,'qemu',1,77,'[{"slot": 0, "path": "/mnt/pmem0/db1.img", "base": "0x1100000000", "size": 1073610752, "label area": 131072, "label server": "qemu", "label address": "none", "backing size": 1073741824, "kind": "fsdax", "device": "6a1f", "start": 1048576, "inode": 12, "generation": 4294967295}]','{"0": 5}',0,'','');
CREATE TABLE counter (
    name TEXT NOT NULL,
    label TEXT NOT NULL,
    value REAL NOT NULL,
    PRIMARY KEY (name, label)
) STRICT;
INSERT INTO "counter" VALUES('starts','',3.0);
CREATE TABLE domain (
    uuid TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    ram INTEGER NOT NULL,
    fault TEXT NOT NULL DEFAULT ''
, dsm TEXT, changed INTEGER NOT NULL DEFAULT 0, cache TEXT) STRICT;
INSERT INTO "domain" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0','db1',4294967296,'','qemu',1700000000000000000,NULL);
INSERT INTO "domain" VALUES('5dea22b3-1d52-d8f3-2516-782e98ab3fa0','db two',1073741824,'no QEMU',NULL,0,NULL);
INSERT INTO "domain" VALUES('6dea22b3-1d52-d8f3-2516-782e98ab3fa0','db3',1073741824,'',NULL,0,NULL);
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    uuid TEXT NOT NULL,
    name TEXT NOT NULL,
    domid INTEGER,
    detail TEXT NOT NULL
) STRICT;
INSERT INTO "event" VALUES(1,1700000000.5,'started','4dea22b3-1d52-d8f3-2516-782e98ab3fa0','db1',7,'{"mappings":1}');
CREATE TABLE frozen (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    path TEXT NOT NULL, given_up INTEGER,
    PRIMARY KEY (uuid, path)
) STRICT;
INSERT INTO "frozen" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0','/mnt/pmem0/db1.img',NULL);
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
INSERT INTO "intent" VALUES('6dea22b3-1d52-d8f3-2516-782e98ab3fa0',0,'/mnt/pmem0/three.img',2097152,0,NULL,NULL,NULL,0,0);
CREATE TABLE latest (changed INTEGER NOT NULL, file TEXT NOT NULL DEFAULT '', id TEXT NOT NULL DEFAULT '', writes INTEGER NOT NULL DEFAULT 0, uncompared INTEGER NOT NULL DEFAULT 0) STRICT;
INSERT INTO "latest" VALUES(1700000000000000000,'12:1700000000.000000005','9a7c0d1e2f304152',41,0);
CREATE TABLE mapping (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    gfn INTEGER NOT NULL, mfn INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (uuid, gfn)
) STRICT;
INSERT INTO "mapping" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',17825792,1311232,262112);
CREATE TABLE never_run (
    uuid TEXT NOT NULL REFERENCES domain(uuid) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    PRIMARY KEY (uuid, number)
) STRICT;
INSERT INTO "never_run" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',77);
CREATE TABLE run (
    uuid TEXT PRIMARY KEY REFERENCES domain(uuid) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    nvdimms TEXT NOT NULL,
    written TEXT NOT NULL
) STRICT;
INSERT INTO "run" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',77,'[{"slot": 0, "path": "/mnt/pmem0/db1.img", "base": "0x1100000000", "size": 1073610752, "label area": 131072, "label server": "qemu", "label address": "none", "backing size": 1073741824, "kind": "fsdax", "device": "6a1f", "start": 1048576, "inode": 12, "generation": 4294967295}]','{"0": 5}');
CREATE TABLE uncached (
    uuid TEXT NOT NULL REFERENCES attachment(uuid) ON DELETE CASCADE,
    gfn INTEGER NOT NULL, count INTEGER NOT NULL
) STRICT;
INSERT INTO "uncached" VALUES('4dea22b3-1d52-d8f3-2516-782e98ab3fa0',18087904,32);
CREATE TABLE unnumbered (
    uuid TEXT PRIMARY KEY REFERENCES domain(uuid) ON DELETE CASCADE
, spoiled INTEGER NOT NULL DEFAULT 0) STRICT;
INSERT INTO "unnumbered" VALUES('5dea22b3-1d52-d8f3-2516-782e98ab3fa0',0);
INSERT INTO "unnumbered" VALUES('6dea22b3-1d52-d8f3-2516-782e98ab3fa0',1);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('event',1);
PRAGMA user_version = 14;
COMMIT;
