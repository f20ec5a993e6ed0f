# SPDX-License-Identifier: Apache-2.0
"""The procedures of libvirt's remote protocol that nvdimm_driver calls or intercepts.

tests/integration/test_rpc_procedures.py compares them with those of the installed libvirt.
"""

from __future__ import annotations

from enum import IntEnum


class Procedure(IntEnum):
    """A call of program 0x20008086, version 1: libvirt's name in ``src/remote/remote_protocol.x``, and its number."""

    CONNECT_OPEN = 1
    CONNECT_CLOSE = 2
    DOMAIN_ATTACH_DEVICE = 8
    DOMAIN_CREATE = 9
    DOMAIN_CREATE_XML = 10
    DOMAIN_DEFINE_XML = 11
    DOMAIN_DETACH_DEVICE = 13
    DOMAIN_GET_XML_DESC = 14
    DOMAIN_LOOKUP_BY_UUID = 24
    DOMAIN_SET_MAX_MEMORY = 30
    DOMAIN_SET_MEMORY = 31
    DOMAIN_UNDEFINE = 35
    DOMAIN_RESTORE = 54
    AUTH_LIST = 66
    CONNECT_DOMAIN_XML_TO_NATIVE = 136
    DOMAIN_IS_ACTIVE = 150
    DOMAIN_IS_PERSISTENT = 151
    CONNECT_GET_LIB_VERSION = 157
    DOMAIN_ATTACH_DEVICE_FLAGS = 160
    DOMAIN_DETACH_DEVICE_FLAGS = 161
    DOMAIN_UPDATE_DEVICE_FLAGS = 174
    DOMAIN_HAS_MANAGED_SAVE_IMAGE = 183
    DOMAIN_CREATE_WITH_FLAGS = 196
    DOMAIN_SET_MEMORY_FLAGS = 204
    DOMAIN_UNDEFINE_FLAGS = 231
    DOMAIN_RESTORE_FLAGS = 233
    DOMAIN_SET_METADATA = 264
    DOMAIN_GET_METADATA = 265
    DOMAIN_MIGRATE_BEGIN3_PARAMS = 302
    DOMAIN_MIGRATE_PREPARE3_PARAMS = 303
    DOMAIN_MIGRATE_PREPARE_TUNNEL3_PARAMS = 304
    DOMAIN_MIGRATE_PERFORM3_PARAMS = 305
    DOMAIN_CREATE_XML_WITH_FILES = 309
    DOMAIN_DEFINE_XML_FLAGS = 350
