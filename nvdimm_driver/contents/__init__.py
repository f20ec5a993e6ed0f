# SPDX-License-Identifier: Apache-2.0
"""Operations on the bytes of backings, with or without a domain: provisioning, import, export, wiping.

Every copy can be interrupted and repeated. copying.py copies; the other modules decide what may be copied.
"""
