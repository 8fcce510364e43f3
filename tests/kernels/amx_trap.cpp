// Runs the tile instructions of a true AMX build on a processor without them: the fault of each is caught, the instruction decoded from its
// bytes and done by amx_emulated.h. So registers, addresses and strides are tested as they were encoded.
#define WAGER_AMX_EMULATED 1
#include <signal.h>
#include <ucontext.h>

#include <atomic>

#include "../../src/wager/kernels/cpp/amx_tiles.h"

namespace {
constexpr int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
enum Prefix { NONE, P66, PF3, PF2 };
std::atomic<long> done{0};
struct sigaction before;

struct Operand {
    char* base;   // with displacement
    long stride;  // the index register, scaled
    int length;   // bytes of ModRM and what follows
};

long value(const greg_t* registers, int number) { return (long)registers[REGISTERS[number]]; }

Operand memory(const uint8_t* modrm, bool index_high, bool base_high, const greg_t* registers) {
    const int mode = *modrm >> 6, rm = *modrm & 7;
    Operand o{nullptr, 0, 1};
    int base = rm + 8 * base_high;
    if (rm == 4) {
        const uint8_t sib = modrm[o.length++];
        const int index = (sib >> 3 & 7) + 8 * index_high;
        base = (sib & 7) + 8 * base_high;
        if (index != 4) o.stride = value(registers, index) << (sib >> 6);
    }
    amx::demand(mode != 3 && !(mode == 0 && base % 8 == 5));  // no addresses relative to the instruction
    long displacement = 0;
    if (mode == 1) displacement = (int8_t)modrm[o.length], o.length += 1;
    if (mode == 2) {
        int32_t four;
        std::memcpy(&four, modrm + o.length, 4);
        displacement = four, o.length += 4;
    }
    o.base = (char*)value(registers, base) + displacement;
    return o;
}

// Its length, or 0 if it is none of ours.
int instruction(const uint8_t* at, const greg_t* registers) {
    if (at[0] != 0xc4 || (at[1] & 31) != 2) return 0;  // VEX of three bytes, opcodes that begin with 0F 38
    const int prefix = at[2] & 3, third = (~at[2] >> 3) & 15, opcode = at[3], modrm = at[4];
    const bool index_high = !(at[1] & 0x40), base_high = !(at[1] & 0x20), direct = modrm >> 6 == 3;
    const int reg = modrm >> 3 & 7, rm = modrm & 7;
    if (opcode == 0x5c && prefix == PF3 && direct) return amx::dpbf16(reg, rm, third), 5;
    if (opcode == 0x5e && prefix == PF3 && direct) return amx::dpbsud(reg, rm, third), 5;
    if (opcode == 0x49 && prefix == PF2 && direct) return amx::zero(reg), 5;
    if (opcode == 0x49 && prefix == NONE && modrm == 0xc0) return amx::release(), 5;
    if (direct || !(opcode == 0x49 || opcode == 0x4b)) return 0;
    const Operand o = memory(at + 4, index_high, base_high, registers);
    if (opcode == 0x49 && prefix == NONE) amx::configure(*(const TileConfig*)o.base);
    else if (opcode == 0x4b && prefix == PF2) amx::load(reg, o.base, o.stride);
    else if (opcode == 0x4b && prefix == PF3) amx::store(reg, o.base, o.stride);
    else return 0;
    return 4 + o.length;
}

void handle(int, siginfo_t*, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const int length = instruction((const uint8_t*)registers[REG_RIP], registers);
    amx::demand(length > 0);
    registers[REG_RIP] += length;
    done++;
}
}  // namespace

extern "C" {
void trap_on() {
    struct sigaction action {};
    action.sa_sigaction = handle, action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before);
}
// Returns how many instructions were caught.
long trap_off() {
    sigaction(SIGILL, &before, nullptr);
    return done.exchange(0);
}
}
