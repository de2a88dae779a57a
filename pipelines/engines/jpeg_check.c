/* Checks a JPEG without decoding it, and makes the image at 1/8 of its size. jpeg_check.py describes the function.
   There is no global state: threads may call at the same time, each with a workspace of its own.

   The verdict CLEAN is for a plain baseline JPEG in which every bit is as the standard demands: libjpeg decodes it
   without a warning. Of everything else, damaged or only unusual, nothing is said: the caller asks libjpeg.

   Nearly all of the data are AC coefficients. One lookup of the next AC_BITS bits finds all symbols whose codes are
   complete in them, how many bits these take with their values, and how many coefficients they pass. Values are
   needed of the DC coefficients and, where libjpeg makes 2x2 pixels of a block (the chroma of 4:2:0), of a block's AC
   coefficients.

   setup.py compiles this file and defines SOURCE_SHA256, its checksum. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { ASK_LIBJPEG, CLEAN };
enum { DC, AC };

#define MAX_SIDE 65500 /* libjpeg's JPEG_MAX_DIMENSION */
#define MAX_BLOCKS 6   /* of an MCU: 2x2 of luma, one of each chroma */
#define DC_BITS 9      /* of a lookup */
#define AC_BITS 12
#define DC_SIZE (1 << DC_BITS)
#define AC_SIZE (1 << AC_BITS)
/* After the data of an interval: zeros that may be read. An MCU takes at most 6 * (27 + 63 * 26) bits. */
#define PAD_BYTES 2048
/* An entry of a lookup table: the number of bits that it takes, of which a shift uses the lowest 6, and above them the
   symbol, or the number of coefficients that several symbols pass. */
#define NUM_BITS(entry) ((entry) & 63)
#define REST(entry) ((entry) >> 6)
#define ENTRY(num_bits, rest) ((num_bits) | (rest) << 6)
#define NO_ENTRY 512     /* instead of a symbol or steps: the code is longer, or there is none */
#define END_OF_BLOCK 256 /* steps; more than those of other symbols, which are at most 16 for each bit */
#define MAX_SYMBOLS 4    /* that are joined */
/* After a refill there are 56 bits. Two entries leave enough of them for a lookup. */
#define MAX_ENTRY_BITS 22
/* Of a coefficient times its quantisation step: encoders make some 1,150 at most. From 2,390 on, 2x2 could overflow. */
#define MAX_VALUE 2000

struct table {
  uint8_t dht[16 + 256];    /* as in the file: number of codes of each length, then the symbols */
  uint32_t limit[17];       /* the first 16 bits above the codes of a length */
  int32_t first[17];        /* index of the symbol of the code 0 of a length; may be negative */
  uint16_t single[AC_SIZE]; /* entries with a symbol; of DC, DC_SIZE */
  uint16_t joined[AC_SIZE]; /* entries with steps; only of AC */
};

struct component {
  int id, h, v, quantisation, table[2];
  int num_pixels;   /* that libjpeg makes of a block on each axis */
  int16_t step[64]; /* of the quantisation, in the order of the file */
  uint8_t *plane;   /* pixels of all MCUs */
};

struct image {
  const uint8_t *at, *end; /* what is not read yet */
  int height, width, num_components;
  uint32_t restart_interval;
  int is_other_colour; /* Adobe's segment says something else than Y, Cb, Cr */
  const uint8_t *dht[2][2];       /* by kind and number; NULL: not defined */
  const uint8_t *quantisation[4]; /* by number, from the byte that says whether the steps have 16 bits */
  size_t stride;                  /* of the planes */
  struct component component[3];
};

struct workspace {
  struct table table[2][2]; /* kept from image to image: many have the same ones */
};

static size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

static size_t plane_bytes(int height, int width) { return (round_up(height, 16) / 8) * (round_up(width, 16) / 8); }

const char *jpeg_check_source(void) { return SOURCE_SHA256; }

size_t jpeg_check_workspace_bytes(size_t num_bytes, int height, int width) {
  return sizeof(struct workspace) + num_bytes + PAD_BYTES + 3 * plane_bytes(height, width);
}

/* Tables of codes */

static int build_limits(struct table *table, const uint8_t *dht) {
  uint32_t code = 0;
  int num_symbols = 0;
  for (int length = 1; length <= 16; length++) {
    int count = dht[length - 1];
    table->first[length] = num_symbols - (int)code;
    code += count, num_symbols += count;
    if (code > 1u << length) return 0;
    table->limit[length] = code << (16 - length);
    code <<= 1;
  }
  return 1;
}

struct symbol { /* the first one of a lookup */
  uint8_t length, num_bits; /* of the code, and with the value */
  uint16_t steps;           /* as in an entry */
};

/* The entry for AC_BITS bits: as many symbols as have their codes in them. */
static uint16_t join_symbols(const struct symbol *first, uint32_t lookup) {
  uint32_t num_bits = 0, steps = 0, is_more = 1;
  for (int k = 0; k < MAX_SYMBOLS; k++) { /* without branches */
    struct symbol next = first[(lookup << num_bits) & (AC_SIZE - 1)];
    is_more &= (num_bits + next.length <= AC_BITS) & (num_bits + next.num_bits <= MAX_ENTRY_BITS);
    num_bits += is_more ? next.num_bits : 0;
    steps += is_more ? next.steps : 0;
    is_more &= steps < END_OF_BLOCK;
  }
  return num_bits ? ENTRY(num_bits, steps) : ENTRY(0, NO_ENTRY);
}

/* Build a table from its bytes in the file, unless it is there already; 0 if they are not valid. */
static int build_table(struct table *table, int kind, const uint8_t *dht) {
  struct symbol first[AC_SIZE];
  int num_symbols = 0, lookup_bits = kind == DC ? DC_BITS : AC_BITS, lookup_size = 1 << lookup_bits;
  for (int i = 0; i < 16; i++) num_symbols += dht[i];
  if (num_symbols == 0) return 0;
  if (memcmp(table->dht, dht, 16 + num_symbols) == 0) return 1;
  memset(table->dht, 0, 16); /* a table that is not valid is not kept */
  if (!build_limits(table, dht)) return 0;
  const uint8_t *symbol = dht + 16;
  int at = 0;
  for (int length = 1; length <= 16; length++) {
    for (int i = 0; i < dht[length - 1]; i++, symbol++) {
      int run = *symbol >> 4, size = *symbol & 15;
      if (kind == DC ? *symbol > 11 : size > 10 || (size == 0 && run != 0 && run != 15)) return 0;
      if (length > lookup_bits) continue;
      struct symbol found = {length, length + size, *symbol == 0 ? END_OF_BLOCK : run + 1};
      uint16_t entry = ENTRY(length + size, *symbol);
      for (int end = at + (1 << (lookup_bits - length)); at < end; at++) {
        first[at] = found;
        table->single[at] = entry;
      }
    }
  }
  for (; at < lookup_size; at++) {
    first[at] = (struct symbol){lookup_bits + 1, 0, 0};
    table->single[at] = table->joined[at] = ENTRY(0, NO_ENTRY);
  }
  for (at = 0; kind == AC && at < lookup_size && first[at].length <= lookup_bits;) {
    /* What follows a symbol is the same for all of its values. */
    int num_bits = first[at].num_bits, num_rest = num_bits < AC_BITS ? 1 << (AC_BITS - num_bits) : 1;
    int num_entries = 1 << (AC_BITS - first[at].length);
    for (int i = 0; i < num_rest; i++) table->joined[at + i] = join_symbols(first, at + i);
    for (int i = num_rest; i < num_entries; i++) table->joined[at + i] = table->joined[at + i - num_rest];
    at += num_entries;
  }
  memcpy(table->dht, dht, 16 + num_symbols);
  return 1;
}

/* The code at the start of 16 bits: returns its length and sets its symbol, or returns 0. */
static inline int find_code(const struct table *table, uint32_t bits, int *symbol) {
  for (int length = 1; length <= 16; length++) {
    if (bits >= table->limit[length]) continue;
    *symbol = table->dht[16 + table->first[length] + (int)(bits >> (16 - length))];
    return length;
  }
  return 0;
}

/* Headers */

static inline uint8_t clamp(int level) { return level < 0 ? 0 : level > 255 ? 255 : level; }

static uint32_t read_u16(const uint8_t *at) { return at[0] << 8 | at[1]; }

static int read_quantisation(struct image *image, const uint8_t *at, const uint8_t *end) {
  while (at < end) {
    int is_wide = *at >> 4, number = *at & 15, num_bytes = 64 << is_wide;
    if (is_wide > 1 || number > 3 || end - at < 1 + num_bytes) return 0;
    image->quantisation[number] = at;
    at += 1 + num_bytes;
  }
  return 1;
}

static int read_codes(struct image *image, const uint8_t *at, const uint8_t *end) {
  while (at < end) {
    int kind = *at >> 4, number = *at & 15, num_symbols = 0;
    if (kind > AC || number > 1 || end - at < 17) return 0;
    for (int i = 1; i <= 16; i++) num_symbols += at[i];
    if (num_symbols > 256 || end - at < 17 + num_symbols) return 0;
    image->dht[kind][number] = at + 1;
    at += 17 + num_symbols;
  }
  return 1;
}

static int read_frame(struct image *image, const uint8_t *at, const uint8_t *end) {
  if (image->num_components || end - at < 6) return 0; /* a second frame */
  int num_components = at[5];
  if (at[0] != 8 || (int)read_u16(at + 1) != image->height || (int)read_u16(at + 3) != image->width) return 0;
  if ((num_components != 1 && num_components != 3) || end - at != 6 + 3 * num_components) return 0;
  image->num_components = num_components;
  for (int i = 0; i < num_components; i++) {
    const uint8_t *entry = at + 6 + 3 * i;
    struct component *component = &image->component[i];
    component->id = entry[0], component->quantisation = entry[2];
    component->h = entry[1] >> 4, component->v = entry[1] & 15;
    int most = i == 0 ? 2 : 1;
    if (component->h < 1 || component->h > most || component->v < 1 || component->v > most) return 0;
    if (component->quantisation > 3) return 0;
    for (int k = 0; k < i; k++) {
      if (image->component[k].id == component->id) return 0;
    }
  }
  const struct component *three = image->component;
  return !(three[0].id == 'R' && three[1].id == 'G' && three[2].id == 'B'); /* which libjpeg takes for the colours */
}

static int read_scan(struct image *image, const uint8_t *at, const uint8_t *end) {
  int n = image->num_components;
  if (n == 0 || end - at != 4 + 2 * n || at[0] != n || (n == 3 && image->is_other_colour)) return 0;
  for (int i = 0; i < n; i++) {
    struct component *component = &image->component[i];
    component->table[DC] = at[2 + 2 * i] >> 4, component->table[AC] = at[2 + 2 * i] & 15;
    if (at[1 + 2 * i] != component->id || component->table[DC] > 1 || component->table[AC] > 1) return 0;
    const uint8_t *steps = image->quantisation[component->quantisation];
    if (steps == NULL) return 0;
    for (int k = 0; k < 64; k++) {
      uint32_t step = steps[0] >> 4 ? read_u16(steps + 1 + 2 * k) : steps[1 + k];
      if (step == 0 || step > MAX_VALUE) return 0;
      component->step[k] = step;
    }
  }
  const uint8_t *last = end - 3;
  return last[0] == 0 && last[1] == 63 && last[2] == 0;
}

/* libjpeg reads two of the applications' segments, and warns of an unknown version or colour. */
static int read_application(struct image *image, int marker, const uint8_t *at, size_t num_bytes) {
  if (marker == 0xE0 && num_bytes >= 14 && memcmp(at, "JFIF", 5) == 0) return at[5] == 1;
  if (marker == 0xEE && num_bytes >= 12 && memcmp(at, "Adobe", 5) == 0) image->is_other_colour = at[11] != 1;
  return 1;
}

/* Read up to the first byte of the coded data. */
static int read_headers(struct image *image) {
  const uint8_t *at = image->at, *end = image->end;
  if (end - at < 2 || at[0] != 0xFF || at[1] != 0xD8) return 0;
  at += 2;
  for (;;) {
    if (end - at < 4 || at[0] != 0xFF) return 0;
    int marker = at[1];
    if (marker == 0xFF) { /* padding */
      at++;
      continue;
    }
    size_t length = read_u16(at + 2);
    if (length < 2 || length > (size_t)(end - at) - 2) return 0;
    const uint8_t *content = at + 4;
    at += 2 + length;
    int is_valid = 0;
    if (marker == 0xDB) is_valid = read_quantisation(image, content, at);
    else if (marker == 0xC4) is_valid = read_codes(image, content, at);
    else if (marker == 0xC0 || marker == 0xC1) is_valid = read_frame(image, content, at);
    else if (marker == 0xDD && length == 4) is_valid = 1, image->restart_interval = read_u16(content);
    else if (marker == 0xDA) return image->at = at, read_scan(image, content, at);
    else if ((marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE)
      is_valid = read_application(image, marker, content, length - 2);
    if (!is_valid) return 0;
  }
}

/* The coded data */

static inline uint64_t read_u64(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

/* The place of each coefficient of the file in its block. */
static const uint8_t PLACE[64] = {
     0,  1,  8, 16,  9,  2,  3, 10, 17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

struct block { /* of an MCU */
  const struct table *dc, *ac;
  const struct component *component;
  int *sum;           /* the last DC coefficient */
  uint8_t *pixels;    /* in the first MCU */
  size_t row, column; /* what the next row of MCUs and the next MCU add to it */
};

/* libjpeg's 2x2 pixels of a block: jpeg_idct_2x2 of jidctred.c. */
static int odd_part(const int *at, int pitch) {
  return 29692 * at[pitch] - 10426 * at[3 * pitch] + 6967 * at[5 * pitch] - 5906 * at[7 * pitch];
}

static void write_2x2(const int *values, uint8_t *pixels, size_t stride) {
  int rows[2][8];
  for (int x = 0; x < 8; x++) {
    int even = values[x] * 32768, odd = odd_part(values + x, 8);
    rows[0][x] = (even + odd + 4096) >> 13, rows[1][x] = (even - odd + 4096) >> 13;
  }
  for (int y = 0; y < 2; y++) {
    int even = rows[y][0] * 32768, odd = odd_part(rows[y], 1);
    pixels[y * stride] = clamp(((even + odd + 524288) >> 20) + 128);
    pixels[y * stride + 1] = clamp(((even - odd + 524288) >> 20) + 128);
  }
}

struct reader {
  const uint8_t *at; /* what follows the next `count` bits */
  uint64_t bits;     /* the next bits, from the highest; there may be more than `count` */
  unsigned count;
};

/* All of these are inlined: compilers then keep a reader in registers. */
#define INLINE static inline __attribute__((always_inline))

INLINE void refill(struct reader *reader) {
  reader->bits |= read_u64(reader->at) >> reader->count;
  reader->at += (63 - reader->count) >> 3;
  reader->count |= 56;
}

INLINE void take(struct reader *reader, unsigned num_bits) { reader->bits <<= num_bits, reader->count -= num_bits; }

/* Read a symbol and its value, of which the symbol's lowest 4 bits give the size; 0 if the code does not exist.
   Needs `lookup_bits` bits, and leaves 29 or more. */
INLINE int read_value(struct reader *reader, const struct table *table, int lookup_bits, int *symbol, int *value) {
  uint32_t entry = table->single[reader->bits >> (64 - lookup_bits)];
  int num_bits = NUM_BITS(entry);
  *symbol = REST(entry);
  refill(reader); /* after the lookup, which need not wait for it */
  if (*symbol == NO_ENTRY) {
    int length = find_code(table, reader->bits >> 48, symbol);
    if (length == 0) return 0;
    num_bits = length + (*symbol & 15);
  }
  int size = *symbol & 15;
  uint64_t bits = reader->bits << (num_bits - size);
  int negative = (int)~((int64_t)bits >> 63); /* all ones if the highest bit is not set */
  *value = (int)(bits >> 1 >> (63 - size)) + (negative & (1 - (1 << size)));
  take(reader, num_bits);
  return 1;
}

/* Read the AC coefficients of a block; 0 if they are not valid. `values` has the products with the steps. */
INLINE int read_coefficients(struct reader *reader, const struct table *table, const int16_t *step, int *values) {
  for (int k = 1; k < 64; k++) {
    int symbol, value;
    if (!read_value(reader, table, AC_BITS, &symbol, &value)) return 0;
    if (symbol == 0) break;
    k += symbol >> 4;
    if (k > 63) return 0;
    value *= step[k];
    if (value < -MAX_VALUE || value > MAX_VALUE) return 0;
    values[PLACE[k]] = value;
  }
  return 1;
}

/* Pass the AC coefficients of a block; 0 if they are not valid. */
INLINE int skip_coefficients(struct reader *reader, const struct table *table) {
  uint32_t k = 1;
  if (reader->count < MAX_ENTRY_BITS + AC_BITS) refill(reader); /* rarely */
  for (;;) {
    struct reader before;
    uint32_t entry;
    do { /* with MAX_ENTRY_BITS + AC_BITS bits or more */
      before = *reader, entry = table->joined[reader->bits >> (64 - AC_BITS)];
      take(reader, NUM_BITS(entry)), k += REST(entry);
      if (k >= 64) break;
      entry = table->joined[reader->bits >> (64 - AC_BITS)];
      refill(reader);
      before = *reader;
      take(reader, NUM_BITS(entry)), k += REST(entry);
    } while (k < 64);
    /* The code for the end of the block is not read after coefficient 63. */
    if (k == 64 || (k >= END_OF_BLOCK && k < END_OF_BLOCK + 64)) return 1;
    /* A longer code, none, or symbols that are those of the next block: take the first symbol alone. */
    *reader = before, k -= REST(entry);
    refill(reader);
    int symbol, length = find_code(table, reader->bits >> 48, &symbol);
    if (length == 0) return 0;
    take(reader, length + (symbol & 15));
    refill(reader);
    if (symbol == 0) return 1;
    k += (symbol >> 4) + 1;
    if (k >= 64) return k == 64;
  }
}

/* Check MCUs from number `mcu` to `end_mcu` - 1, which take all bytes of [at, end) but less than one. */
static int check_interval(const struct image *image, const struct block *blocks, int num_blocks, const uint8_t *at,
                          const uint8_t *end, uint32_t mcu, uint32_t end_mcu, uint32_t mcus_per_row) {
  struct reader reader = {.at = at};
  refill(&reader);
  for (; mcu < end_mcu; mcu++) {
    uint32_t row = mcu / mcus_per_row, column = mcu % mcus_per_row;
    if (reader.at > end + 8) return 0;
    for (const struct block *block = blocks; block < blocks + num_blocks; block++) {
      int size, difference;
      if (!read_value(&reader, block->dc, DC_BITS, &size, &difference)) return 0;
      int value = (*block->sum += difference) * block->component->step[0];
      if (value < -MAX_VALUE || value > MAX_VALUE) return 0;
      uint8_t *pixels = block->pixels + row * block->row + column * block->column;
      if (block->component->num_pixels == 1) {
        pixels[0] = clamp(((value + 4) >> 3) + 128); /* libjpeg's jpeg_idct_1x1 */
        if (!skip_coefficients(&reader, block->ac)) return 0;
      } else {
        int values[64] = {value};
        if (!read_coefficients(&reader, block->ac, block->component->step, values)) return 0;
        write_2x2(values, pixels, image->stride);
      }
    }
  }
  ptrdiff_t num_bits = 8 * (reader.at - at) - (ptrdiff_t)reader.count, num_left = 8 * (end - at) - num_bits;
  return num_left >= 0 && num_left < 8;
}

/* Copy the data up to the next marker without the zeros after 0xFF; returns the end of the copy, NULL if no marker. */
static uint8_t *copy_interval(struct image *image, uint8_t *to) {
  const uint8_t *at = image->at, *end = image->end;
  for (;;) {
    const uint8_t *found = memchr(at, 0xFF, end - at);
    if (found == NULL || found + 1 >= end) return NULL;
    memcpy(to, at, found - at);
    to += found - at;
    at = found;
    if (at[1] != 0) break;
    *to++ = 0xFF;
    at += 2;
  }
  while (end - at >= 2 && at[1] == 0xFF) at++; /* padding */
  image->at = at;
  return to;
}

static int check_scan(struct image *image, const struct workspace *workspace, uint8_t *scratch) {
  struct block blocks[MAX_BLOCKS];
  int num_blocks = 0, is_grey = image->num_components == 1; /* whose MCUs are blocks, whatever the sampling */
  int sums[3];
  for (int i = 0; i < image->num_components; i++) {
    const struct component *component = &image->component[i];
    size_t h = is_grey ? 1 : component->h, v = is_grey ? 1 : component->v;
    for (size_t k = 0; k < h * v; k++) {
      blocks[num_blocks++] = (struct block){
          .dc = &workspace->table[DC][component->table[DC]],
          .ac = &workspace->table[AC][component->table[AC]],
          .component = component,
          .sum = &sums[i],
          .pixels = component->plane + k / h * image->stride + k % h,
          .row = v * component->num_pixels * image->stride,
          .column = h * component->num_pixels,
      };
    }
  }
  uint32_t mcu_width = is_grey ? 8 : 8 * image->component[0].h, mcu_height = is_grey ? 8 : 8 * image->component[0].v;
  uint32_t mcus_per_row = (image->width + mcu_width - 1) / mcu_width;
  uint32_t num_mcus = mcus_per_row * ((image->height + mcu_height - 1) / mcu_height);
  uint32_t interval = image->restart_interval ? image->restart_interval : num_mcus;
  int next_restart = 0;
  for (uint32_t mcu = 0;;) {
    uint32_t end_mcu = num_mcus - mcu > interval ? mcu + interval : num_mcus;
    uint8_t *end = copy_interval(image, scratch);
    if (end == NULL || image->end - image->at < 2) return 0;
    memset(end, 0, PAD_BYTES);
    int marker = image->at[1];
    image->at += 2;
    if (marker != (end_mcu == num_mcus ? 0xD9 : 0xD0 + next_restart)) return 0;
    next_restart = (next_restart + 1) & 7;
    memset(sums, 0, sizeof sums);
    if (!check_interval(image, blocks, num_blocks, scratch, end, mcu, end_mcu, mcus_per_row)) return 0;
    if (end_mcu == num_mcus) return 1;
    mcu = end_mcu;
  }
}

/* The image at 1/8 of its size */

static void write_small(const struct image *image, uint8_t *small) {
  int height = (image->height + 7) / 8, width = (image->width + 7) / 8;
  const struct component *luma = &image->component[0], *blue = &image->component[1], *red = &image->component[2];
  /* Where there are half as many pixels of chroma, libjpeg repeats each. */
  int is_half_wide = luma->h > blue->num_pixels, is_half_high = luma->v > blue->num_pixels;
  for (int y = 0; y < height; y++) {
    const uint8_t *levels = luma->plane + y * image->stride;
    size_t chroma = (y >> is_half_high) * image->stride;
    for (int x = 0; x < width; x++, small += 3) {
      if (image->num_components == 1) {
        small[0] = small[1] = small[2] = levels[x];
        continue;
      }
      int cb = blue->plane[chroma + (x >> is_half_wide)] - 128, cr = red->plane[chroma + (x >> is_half_wide)] - 128;
      small[0] = clamp(levels[x] + ((91881 * cr + 32768) >> 16)); /* as libjpeg's jdcolor.c */
      small[1] = clamp(levels[x] + ((-22554 * cb - 46802 * cr + 32768) >> 16));
      small[2] = clamp(levels[x] + ((116130 * cb + 32768) >> 16));
    }
  }
}

int jpeg_check(const uint8_t *data, size_t num_bytes, int height, int width, uint8_t *memory, uint8_t *small) {
  struct workspace *workspace = (struct workspace *)memory;
  struct image image = {.at = data, .end = data + num_bytes, .height = height, .width = width};
  if (height < 1 || height > MAX_SIDE || width < 1 || width > MAX_SIDE || !read_headers(&image)) return ASK_LIBJPEG;
  uint8_t *planes = memory + sizeof *workspace, *scratch = planes + 3 * plane_bytes(height, width);
  image.stride = round_up(width, 16) / 8;
  for (int i = 0; i < image.num_components; i++) {
    struct component *component = &image.component[i];
    component->plane = planes + i * plane_bytes(height, width);
    component->num_pixels = i > 0 && image.component[0].h == 2 && image.component[0].v == 2 ? 2 : 1;
    for (int kind = DC; kind <= AC; kind++) {
      const uint8_t *dht = image.dht[kind][component->table[kind]];
      if (dht == NULL || !build_table(&workspace->table[kind][component->table[kind]], kind, dht)) return ASK_LIBJPEG;
    }
  }
  if (!check_scan(&image, workspace, scratch)) return ASK_LIBJPEG;
  write_small(&image, small);
  return CLEAN;
}
