DefinitionBlock ("", "SSDT", 2, "NVDRV ", "NVDIMM", 1)
{
    Scope (\_SB)
    {
        Device (NVDR)
        {
            Name (_HID, "ACPI0012")
            Method (RPAG, 1, Serialized)
            {
                OperationRegion (LREG, SystemMemory, Arg0, 0x1000)
                Field (LREG, QWordAcc, NoLock, Preserve) { LPAG, 32768 }
                Return (LPAG)
            }
            Method (WPAG, 2, Serialized)
            {
                OperationRegion (LREG, SystemMemory, Arg0, 0x1000)
                Field (LREG, QWordAcc, NoLock, Preserve) { LPAG, 32768 }
                LPAG = Arg1
            }
            Method (RLAB, 2, Serialized)
            {
                Local0 = Buffer (Zero) {}
                Local5 = Arg0
                Local6 = Arg1
                While (Local6 > 0)
                {
                    Local1 = Local5 & 0xFFF
                    Local2 = 0x1000 - Local1
                    If (Local2 > Local6) { Local2 = Local6 }
                    Local3 = RPAG (Local5 - Local1)
                    Concatenate (Local0, Mid (Local3, Local1, Local2), Local0)
                    Local5 += Local2
                    Local6 -= Local2
                }
                Return (Local0)
            }
            Method (WLAB, 2, Serialized)
            {
                Local5 = Arg0
                Local6 = SizeOf (Arg1)
                Local7 = 0
                While (Local6 > 0)
                {
                    Local1 = Local5 & 0xFFF
                    Local2 = 0x1000 - Local1
                    If (Local2 > Local6) { Local2 = Local6 }
                    Local3 = RPAG (Local5 - Local1)
                    Concatenate (Mid (Local3, 0, Local1), Mid (Arg1, Local7, Local2), Local4)
                    Concatenate (Local4, Mid (Local3, Local1 + Local2, 0x1000), Local4)
                    WPAG (Local5 - Local1, Local4)
                    Local5 += Local2
                    Local6 -= Local2
                    Local7 += Local2
                }
            }
            Method (LD32, 1, Serialized)
            {
                Local0 = Buffer (4) {}
                CreateDWordField (Local0, 0, LVAL)
                LVAL = Arg0
                Return (Local0)
            }
            Method (LDSM, 6, Serialized)
            {
                If ((Arg0 != ToUUID ("4309ac30-0d11-11e4-9191-0800200c9a66")) || (Arg1 != 1))
                {
                    Return (Buffer (1) { 0x00 })
                }
                If (Arg2 == 0) { Return (Buffer (1) { 0x71 }) }
                If (Arg2 == 4) { Return (Concatenate (Concatenate (LD32 (0), LD32 (Arg5)), LD32 (0x1000))) }
                If ((Arg2 < 5) || (Arg2 > 6)) { Return (LD32 (1)) }
                Local0 = DerefOf (Arg3 [0])
                If (SizeOf (Local0) < 8) { Return (LD32 (3)) }
                CreateDWordField (Local0, 0, LOFF)
                CreateDWordField (Local0, 4, LLEN)
                If ((LLEN > 0x1000) || ((LOFF + LLEN) > Arg5)) { Return (LD32 (3)) }
                If (Arg2 == 5) { Return (Concatenate (LD32 (0), RLAB (Arg4 + LOFF, LLEN))) }
                If (SizeOf (Local0) < (LLEN + 8)) { Return (LD32 (3)) }
                WLAB (Arg4 + LOFF, Mid (Local0, 8, LLEN))
                Return (LD32 (0))
            }
            Device (NV00)
            {
                Name (_ADR, 1)
                Method (_DSM, 4, Serialized) { Return (LDSM (Arg0, Arg1, Arg2, Arg3, 0x1104000000, 0x20000)) }
            }
            Device (NV01) { Name (_ADR, 2) }
        }
        Device (NVRS)
        {
            Name (_HID, EisaId ("PNP0C02"))
            Name (_UID, "NVDIMM labels")
            Name (_CRS, ResourceTemplate ()
            {
                QWordMemory (ResourceConsumer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,
                    0, 0x1104000000, 0x110401FFFF, 0, 0x20000)
            })
        }
    }
}
