// Writes more of a label area than fits on a line of acpiexec's input, as a guest does: PUT (offset, length, first byte).
DefinitionBlock ("", "SSDT", 2, "TEST  ", "PUT", 1)
{
    External (\_SB.NVDR.NV00._DSM, MethodObj)
    Method (PUT, 3, Serialized)
    {
        Local0 = Buffer (8) {}
        CreateDWordField (Local0, 0, POFF)
        CreateDWordField (Local0, 4, PLEN)
        POFF = Arg0
        PLEN = Arg1
        Local1 = Buffer (Arg1) {}
        Local2 = 0
        While (Local2 < Arg1)
        {
            Local1 [Local2] = Arg2 + Local2
            Local2++
        }
        Local3 = Package (1) {}
        Local3 [0] = Concatenate (Local0, Local1)
        Return (\_SB.NVDR.NV00._DSM (ToUUID ("4309ac30-0d11-11e4-9191-0800200c9a66"), 1, 6, Local3))
    }
}
