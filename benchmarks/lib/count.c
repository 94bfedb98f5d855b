/* A plugin for QEMU 6 to 8 that prints how many instructions the emulated program executed. Its
 * functions are declared here, as packages of QEMU do not have the header. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t Plugin;
typedef struct qemu_plugin_tb Block;
size_t qemu_plugin_tb_n_insns(const Block *block);
void qemu_plugin_register_vcpu_tb_exec_inline(Block *block, int add, void *to, uint64_t number);
void qemu_plugin_register_vcpu_tb_trans_cb(Plugin id, void (*function)(Plugin, Block *));
void qemu_plugin_register_atexit_cb(Plugin id, void (*function)(Plugin, void *), void *of);

EXPORT int qemu_plugin_version = 1;
static uint64_t total;

static void translated(Plugin id, Block *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &total, qemu_plugin_tb_n_insns(block));
}

static void ended(Plugin id, void *of) {
    (void)id, (void)of;
    fprintf(stderr, "%llu\n", (unsigned long long)total);
}

EXPORT int qemu_plugin_install(Plugin id, const void *about, int count, char **arguments) {
    (void)about, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
