// Written by wgmma_operands.py. X(N, D, I0 to I6, constraints): D names the N / 2 accumulators %0, %1, ..., and
// I0 to I6 the operands that follow them.
#pragma once
#define FASTVIT_WGMMA_D_8 "%0, %1, %2, %3"
#define FASTVIT_WGMMA_R_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTVIT_WGMMA_D_16 FASTVIT_WGMMA_D_8 ", %4, %5, %6, %7"
#define FASTVIT_WGMMA_R_16 FASTVIT_WGMMA_R_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTVIT_WGMMA_D_24 FASTVIT_WGMMA_D_16 ", %8, %9, %10, %11"
#define FASTVIT_WGMMA_R_24 FASTVIT_WGMMA_R_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTVIT_WGMMA_D_32 FASTVIT_WGMMA_D_24 ", %12, %13, %14, %15"
#define FASTVIT_WGMMA_R_32 FASTVIT_WGMMA_R_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTVIT_WGMMA_D_40 FASTVIT_WGMMA_D_32 ", %16, %17, %18, %19"
#define FASTVIT_WGMMA_R_40 FASTVIT_WGMMA_R_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTVIT_WGMMA_D_48 FASTVIT_WGMMA_D_40 ", %20, %21, %22, %23"
#define FASTVIT_WGMMA_R_48 FASTVIT_WGMMA_R_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTVIT_WGMMA_D_56 FASTVIT_WGMMA_D_48 ", %24, %25, %26, %27"
#define FASTVIT_WGMMA_R_56 FASTVIT_WGMMA_R_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTVIT_WGMMA_D_64 FASTVIT_WGMMA_D_56 ", %28, %29, %30, %31"
#define FASTVIT_WGMMA_R_64 FASTVIT_WGMMA_R_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTVIT_WGMMA_D_72 FASTVIT_WGMMA_D_64 ", %32, %33, %34, %35"
#define FASTVIT_WGMMA_R_72 FASTVIT_WGMMA_R_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTVIT_WGMMA_D_80 FASTVIT_WGMMA_D_72 ", %36, %37, %38, %39"
#define FASTVIT_WGMMA_R_80 FASTVIT_WGMMA_R_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTVIT_WGMMA_D_88 FASTVIT_WGMMA_D_80 ", %40, %41, %42, %43"
#define FASTVIT_WGMMA_R_88 FASTVIT_WGMMA_R_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTVIT_WGMMA_D_96 FASTVIT_WGMMA_D_88 ", %44, %45, %46, %47"
#define FASTVIT_WGMMA_R_96 FASTVIT_WGMMA_R_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTVIT_WGMMA_D_104 FASTVIT_WGMMA_D_96 ", %48, %49, %50, %51"
#define FASTVIT_WGMMA_R_104 FASTVIT_WGMMA_R_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTVIT_WGMMA_D_112 FASTVIT_WGMMA_D_104 ", %52, %53, %54, %55"
#define FASTVIT_WGMMA_R_112 FASTVIT_WGMMA_R_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTVIT_WGMMA_D_120 FASTVIT_WGMMA_D_112 ", %56, %57, %58, %59"
#define FASTVIT_WGMMA_R_120 FASTVIT_WGMMA_R_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTVIT_WGMMA_D_128 FASTVIT_WGMMA_D_120 ", %60, %61, %62, %63"
#define FASTVIT_WGMMA_R_128 FASTVIT_WGMMA_R_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTVIT_WGMMA_D_136 FASTVIT_WGMMA_D_128 ", %64, %65, %66, %67"
#define FASTVIT_WGMMA_R_136 FASTVIT_WGMMA_R_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTVIT_WGMMA_D_144 FASTVIT_WGMMA_D_136 ", %68, %69, %70, %71"
#define FASTVIT_WGMMA_R_144 FASTVIT_WGMMA_R_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTVIT_WGMMA_D_152 FASTVIT_WGMMA_D_144 ", %72, %73, %74, %75"
#define FASTVIT_WGMMA_R_152 FASTVIT_WGMMA_R_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTVIT_WGMMA_D_160 FASTVIT_WGMMA_D_152 ", %76, %77, %78, %79"
#define FASTVIT_WGMMA_R_160 FASTVIT_WGMMA_R_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTVIT_WGMMA_D_168 FASTVIT_WGMMA_D_160 ", %80, %81, %82, %83"
#define FASTVIT_WGMMA_R_168 FASTVIT_WGMMA_R_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTVIT_WGMMA_D_176 FASTVIT_WGMMA_D_168 ", %84, %85, %86, %87"
#define FASTVIT_WGMMA_R_176 FASTVIT_WGMMA_R_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTVIT_WGMMA_D_184 FASTVIT_WGMMA_D_176 ", %88, %89, %90, %91"
#define FASTVIT_WGMMA_R_184 FASTVIT_WGMMA_R_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTVIT_WGMMA_D_192 FASTVIT_WGMMA_D_184 ", %92, %93, %94, %95"
#define FASTVIT_WGMMA_R_192 FASTVIT_WGMMA_R_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTVIT_WGMMA_D_200 FASTVIT_WGMMA_D_192 ", %96, %97, %98, %99"
#define FASTVIT_WGMMA_R_200 FASTVIT_WGMMA_R_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTVIT_WGMMA_D_208 FASTVIT_WGMMA_D_200 ", %100, %101, %102, %103"
#define FASTVIT_WGMMA_R_208 FASTVIT_WGMMA_R_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTVIT_WGMMA_D_216 FASTVIT_WGMMA_D_208 ", %104, %105, %106, %107"
#define FASTVIT_WGMMA_R_216 FASTVIT_WGMMA_R_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTVIT_WGMMA_D_224 FASTVIT_WGMMA_D_216 ", %108, %109, %110, %111"
#define FASTVIT_WGMMA_R_224 FASTVIT_WGMMA_R_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTVIT_WGMMA_D_232 FASTVIT_WGMMA_D_224 ", %112, %113, %114, %115"
#define FASTVIT_WGMMA_R_232 FASTVIT_WGMMA_R_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTVIT_WGMMA_D_240 FASTVIT_WGMMA_D_232 ", %116, %117, %118, %119"
#define FASTVIT_WGMMA_R_240 FASTVIT_WGMMA_R_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTVIT_WGMMA_D_248 FASTVIT_WGMMA_D_240 ", %120, %121, %122, %123"
#define FASTVIT_WGMMA_R_248 FASTVIT_WGMMA_R_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTVIT_WGMMA_D_256 FASTVIT_WGMMA_D_248 ", %124, %125, %126, %127"
#define FASTVIT_WGMMA_R_256 FASTVIT_WGMMA_R_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define FASTVIT_WGMMA_EACH(X) \
  X(8, FASTVIT_WGMMA_D_8, "%4", "%5", "%6", "%7", "%8", "%9", "%10", FASTVIT_WGMMA_R_8) \
  X(16, FASTVIT_WGMMA_D_16, "%8", "%9", "%10", "%11", "%12", "%13", "%14", FASTVIT_WGMMA_R_16) \
  X(24, FASTVIT_WGMMA_D_24, "%12", "%13", "%14", "%15", "%16", "%17", "%18", FASTVIT_WGMMA_R_24) \
  X(32, FASTVIT_WGMMA_D_32, "%16", "%17", "%18", "%19", "%20", "%21", "%22", FASTVIT_WGMMA_R_32) \
  X(40, FASTVIT_WGMMA_D_40, "%20", "%21", "%22", "%23", "%24", "%25", "%26", FASTVIT_WGMMA_R_40) \
  X(48, FASTVIT_WGMMA_D_48, "%24", "%25", "%26", "%27", "%28", "%29", "%30", FASTVIT_WGMMA_R_48) \
  X(56, FASTVIT_WGMMA_D_56, "%28", "%29", "%30", "%31", "%32", "%33", "%34", FASTVIT_WGMMA_R_56) \
  X(64, FASTVIT_WGMMA_D_64, "%32", "%33", "%34", "%35", "%36", "%37", "%38", FASTVIT_WGMMA_R_64) \
  X(72, FASTVIT_WGMMA_D_72, "%36", "%37", "%38", "%39", "%40", "%41", "%42", FASTVIT_WGMMA_R_72) \
  X(80, FASTVIT_WGMMA_D_80, "%40", "%41", "%42", "%43", "%44", "%45", "%46", FASTVIT_WGMMA_R_80) \
  X(88, FASTVIT_WGMMA_D_88, "%44", "%45", "%46", "%47", "%48", "%49", "%50", FASTVIT_WGMMA_R_88) \
  X(96, FASTVIT_WGMMA_D_96, "%48", "%49", "%50", "%51", "%52", "%53", "%54", FASTVIT_WGMMA_R_96) \
  X(104, FASTVIT_WGMMA_D_104, "%52", "%53", "%54", "%55", "%56", "%57", "%58", FASTVIT_WGMMA_R_104) \
  X(112, FASTVIT_WGMMA_D_112, "%56", "%57", "%58", "%59", "%60", "%61", "%62", FASTVIT_WGMMA_R_112) \
  X(120, FASTVIT_WGMMA_D_120, "%60", "%61", "%62", "%63", "%64", "%65", "%66", FASTVIT_WGMMA_R_120) \
  X(128, FASTVIT_WGMMA_D_128, "%64", "%65", "%66", "%67", "%68", "%69", "%70", FASTVIT_WGMMA_R_128) \
  X(136, FASTVIT_WGMMA_D_136, "%68", "%69", "%70", "%71", "%72", "%73", "%74", FASTVIT_WGMMA_R_136) \
  X(144, FASTVIT_WGMMA_D_144, "%72", "%73", "%74", "%75", "%76", "%77", "%78", FASTVIT_WGMMA_R_144) \
  X(152, FASTVIT_WGMMA_D_152, "%76", "%77", "%78", "%79", "%80", "%81", "%82", FASTVIT_WGMMA_R_152) \
  X(160, FASTVIT_WGMMA_D_160, "%80", "%81", "%82", "%83", "%84", "%85", "%86", FASTVIT_WGMMA_R_160) \
  X(168, FASTVIT_WGMMA_D_168, "%84", "%85", "%86", "%87", "%88", "%89", "%90", FASTVIT_WGMMA_R_168) \
  X(176, FASTVIT_WGMMA_D_176, "%88", "%89", "%90", "%91", "%92", "%93", "%94", FASTVIT_WGMMA_R_176) \
  X(184, FASTVIT_WGMMA_D_184, "%92", "%93", "%94", "%95", "%96", "%97", "%98", FASTVIT_WGMMA_R_184) \
  X(192, FASTVIT_WGMMA_D_192, "%96", "%97", "%98", "%99", "%100", "%101", "%102", FASTVIT_WGMMA_R_192) \
  X(200, FASTVIT_WGMMA_D_200, "%100", "%101", "%102", "%103", "%104", "%105", "%106", FASTVIT_WGMMA_R_200) \
  X(208, FASTVIT_WGMMA_D_208, "%104", "%105", "%106", "%107", "%108", "%109", "%110", FASTVIT_WGMMA_R_208) \
  X(216, FASTVIT_WGMMA_D_216, "%108", "%109", "%110", "%111", "%112", "%113", "%114", FASTVIT_WGMMA_R_216) \
  X(224, FASTVIT_WGMMA_D_224, "%112", "%113", "%114", "%115", "%116", "%117", "%118", FASTVIT_WGMMA_R_224) \
  X(232, FASTVIT_WGMMA_D_232, "%116", "%117", "%118", "%119", "%120", "%121", "%122", FASTVIT_WGMMA_R_232) \
  X(240, FASTVIT_WGMMA_D_240, "%120", "%121", "%122", "%123", "%124", "%125", "%126", FASTVIT_WGMMA_R_240) \
  X(248, FASTVIT_WGMMA_D_248, "%124", "%125", "%126", "%127", "%128", "%129", "%130", FASTVIT_WGMMA_R_248) \
  X(256, FASTVIT_WGMMA_D_256, "%128", "%129", "%130", "%131", "%132", "%133", "%134", FASTVIT_WGMMA_R_256)
