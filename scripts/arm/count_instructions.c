/* A plugin of qemu's user mode that counts the instructions of the guest and prints their number at the end.
 *
 * Debian has no header for plugins, so the part of their interface (version 1, qemu 4.2 to 8) that is used stands here.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

typedef uint64_t id_t_;
struct tb;
enum { ADD_U64 = 0 };

int qemu_plugin_version = 1;

void qemu_plugin_register_vcpu_tb_trans_cb(id_t_ id, void (*callback)(id_t_ id, struct tb *block));
size_t qemu_plugin_tb_n_insns(const struct tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct tb *block, int operation, void *counter, uint64_t added);
void qemu_plugin_register_atexit_cb(id_t_ id, void (*callback)(id_t_ id, void *data), void *data);

static uint64_t count;

static void translated(id_t_ id, struct tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &count, qemu_plugin_tb_n_insns(block));
}

static void finished(id_t_ id, void *data) {
    (void)id;
    (void)data;
    fprintf(stderr, "instructions %" PRIu64 "\n", count);
}

int qemu_plugin_install(id_t_ id, const void *info, int argc, char **argv) {
    (void)info;
    (void)argc;
    (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
